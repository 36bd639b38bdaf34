"""Running graphs: whole, block by block, backwards, and two against each other."""
