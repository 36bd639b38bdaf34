"""Checkpoints for servers: compressed-tensors and AscendV1."""
