"""Orthogonal matrices and how weights absorb them."""
