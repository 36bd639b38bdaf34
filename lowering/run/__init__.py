"""From a saved lowered graph to one that runs."""
