"""What a compiled model is saved as, one folder a format."""
