"""What runs a model: the seam, and one module per thing that runs models."""
