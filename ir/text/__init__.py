"""Graphs as text and as JSON."""
