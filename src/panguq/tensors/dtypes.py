"""How dtypes are called in files, recipes and messages."""

from __future__ import annotations

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")
