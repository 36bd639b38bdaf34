"""Measuring what this machine's kernels cost."""
