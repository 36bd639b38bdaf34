"""Lowering for a plain CPU."""
