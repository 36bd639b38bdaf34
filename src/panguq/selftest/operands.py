"""Operands of calls of torch_npu's ops: random tensors of each kind, and common sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from panguq.kernels.ascend.vendor.dtypes import dtype_number

Arguments = dict[str, Any]
Call = tuple[OpOverload, Callable[[int], Arguments]]

K, N, GROUP = 512, 64, 64
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8, INT32, INT64 = torch.int8, torch.int32, torch.int64
BF16_NUMBER, FP16_NUMBER = dtype_number(BF16), dtype_number(FP16)
QINT8, QUINT4X2 = dtype_number(torch.qint8), dtype_number(torch.quint4x2)


def reals(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.rand(*shape).add_(0.01).to(dtype)


def steps(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Small enough that sums of products of codes stay within float16."""
    return torch.rand(*shape).add_(0.1).mul_(0.002).to(dtype)


def int8s(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=INT8)


def words(*shape: int) -> torch.Tensor:
    """Packed int4: any bits are legal."""
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=INT32)
