"""Backends: their interface (`base`), and one module per library, engine or server that runs models."""
