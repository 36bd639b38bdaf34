"""What a pass is, the registry of passes, and their runner."""
