"""What a saved checkpoint is checked for, one file a format."""
