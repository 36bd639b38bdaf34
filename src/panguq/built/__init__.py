"""Compiled models built ahead of time: their graphs' code, made by torch's compiler, in a cache."""
