"""Calibration data under one name: what may be given, and the inputs that are made of it."""

from __future__ import annotations

from panguq.data.calibration import causal_lm_batches, module_batches, token_windows
from panguq.data.calibration_data import read_calibration

__all__ = ["causal_lm_batches", "module_batches", "read_calibration", "token_windows"]
