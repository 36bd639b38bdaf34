"""Patterns of traced ops that canonicalize raises into one op."""
