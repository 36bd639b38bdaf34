"""Choosing a weight's codes and scales."""
