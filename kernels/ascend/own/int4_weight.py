"""The 4-bit weight layout of Ascend's kernels, made of the one that panguq stores."""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.ir.ops.opset import define_op
from panguq.ir.ops.packing import pack_int4, unpack_int4
from panguq.kernels.ascend.limits import CODES_PER_WORD


def _fake_int4_weight(packed: Tensor) -> Tensor:
    n, bytes_per_row = packed.shape
    return packed.new_empty((bytes_per_row * 2, n // CODES_PER_WORD), dtype=torch.int32)


@define_op("int4_weight(Tensor packed) -> Tensor", fake=_fake_int4_weight, namespace="panguq_npu")
def int4_weight(packed: Tensor) -> Tensor:
    """uint8 [n, k / 2] as `pack_int4` packs -> int32 [k, n / 8], n a multiple of 8.

    The bytes that torch_npu's npu_convert_weight_to_int4pack makes of int32 codes [k, n]: eight
    neighbouring outputs a word, the lowest nibble first, two's complement.
    """
    return pack_int4(unpack_int4(packed).t().contiguous()).view(torch.int32)
