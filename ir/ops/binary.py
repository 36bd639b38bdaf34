"""Weights that are a sign times one of two magnitudes: what BiLLM stores.

Columns come in blocks, and within a block a column is salient or not. An output has four
magnitudes a block, a smaller and a larger one for either kind of column, so that a weight is two
bits: its sign, and which of the two it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.ir.ops.opset import define_op

MAGNITUDES_PER_BLOCK = 4  # small and large of the other columns, small and large of salient ones


def _fake_dequantize_binary(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@define_op(
    "dequantize_binary(Tensor codes, Tensor magnitudes, Tensor salient, int block_size,"
    " ScalarType dtype) -> Tensor",
    fake=_fake_dequantize_binary,
)
def dequantize_binary(
    codes: Tensor, magnitudes: Tensor, salient: Tensor, block_size: int, dtype: torch.dtype
) -> Tensor:
    """sign * magnitude, where the codes -2, -1, 0, 1 mean -large, -small, +small, +large.

    codes int8 [n, k]; magnitudes float [n, 4 * ceil(k / block_size)], for each block small and
    large of its other columns, then small and large of its salient ones; salient int8 [1, k], not
    zero for salient columns. Returns `dtype` [n, k], each value rounded once.
    """
    codes = codes.contiguous()
    blocks = torch.arange(codes.shape[1], device=codes.device) // block_size
    small = blocks * MAGNITUDES_PER_BLOCK + 2 * (salient[0] != 0)
    stored = magnitudes.to(dtype)
    is_large = codes.bitwise_xor(codes >> 7) == 1
    values = torch.where(is_large, stored.index_select(1, small + 1), stored.index_select(1, small))
    return torch.where(codes < 0, -values, values)
