"""The target without kernels."""
