"""Tensors larger than memory: mapped, sliced, spilled, kept in work folders."""
