"""Fitting an Ascend target to the op times of a user's own NPU."""
