"""Where channels can be scaled, by how much, and how weights absorb it."""
