"""What is inside model files, read as data."""
