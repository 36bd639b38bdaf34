"""Where float models come from: local folders in several forms."""
