"""Pages to look at: one file each, with its data as JSON in it, and nothing from a network."""
