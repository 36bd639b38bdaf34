"""Reading and writing files strictly: JSON, YAML, manifests, whole folders."""
