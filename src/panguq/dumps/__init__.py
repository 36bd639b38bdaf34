"""Pass-by-pass dumps: writing, reading, running and bisecting them."""
