"""Dtype arguments of torch_npu's ops: the schemas say int, PyTorch's number of a dtype.

A graph holds the number, since some of the dtypes (qint8, quint4x2) are no dtype of a tensor in it.
"""

from __future__ import annotations

import torch

# The order of c10/core/ScalarType.h, which PyTorch keeps for the sake of its files.
_NUMBERS = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.qint8: 12,
    torch.quint8: 13,
    torch.bfloat16: 15,
    torch.quint4x2: 16,
}
_DTYPES = {number: dtype for dtype, number in _NUMBERS.items()}


def dtype_number(dtype: torch.dtype) -> int:
    """The int by which a dtype is passed to a torch_npu op. Raises KeyError for an unused dtype."""
    return _NUMBERS[dtype]


def dtype_of(argument: int | torch.dtype | None, default: torch.dtype) -> torch.dtype | None:
    """The dtype that such an argument means, `default` for None; None for an unknown number."""
    if argument is None:
        return default
    return argument if isinstance(argument, torch.dtype) else _DTYPES.get(argument)
