"""Write to and read from MLflow: runs, the published view, the Model Registry."""
