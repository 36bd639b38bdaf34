"""Invertible maps of activations, learned against the error of quantization."""
