"""Find, download, check and generate the files of a model."""
