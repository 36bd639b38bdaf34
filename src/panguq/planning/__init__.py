"""The dry run: what a compile would do and cost."""
