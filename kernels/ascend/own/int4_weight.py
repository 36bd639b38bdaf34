"""The 4-bit weight layouts of Ascend's kernels, made of the one that panguq stores."""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.ir.ops.opset import define_op
from panguq.ir.ops.packing import pack_int4, unpack_int4
from panguq.kernels.ascend.limits import CODES_PER_WORD

QUARTERS = 4  # codes of an int16 word


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


def _fake_int4_quarters(packed: Tensor) -> Tensor:
    n, bytes_per_row = packed.shape
    return packed.new_empty((bytes_per_row * 2, n // QUARTERS), dtype=torch.int16)


@define_op(
    "int4_quarters(Tensor packed) -> Tensor", fake=_fake_int4_quarters, namespace="panguq_npu"
)
def int4_quarters(packed: Tensor) -> Tensor:
    """uint8 [n, k / 2] as `pack_int4` packs -> int16 [k, n / 4], n a multiple of 8.

    Word c of a row holds the codes of outputs c, c + n / 4, c + n / 2 and c + 3 n / 4, the lowest
    nibble first, two's complement. What a kernel unpacks of a word then belongs to four different
    tiles, each in the order of its outputs, so that nothing has to be interleaved.
    """
    codes = unpack_int4(packed).t().contiguous()
    k, n = codes.shape
    words = codes.view(k, QUARTERS, n // QUARTERS).transpose(1, 2).contiguous()
    return pack_int4(words.view(k, n)).view(torch.int16)


def codes_of_quarters(words: Tensor) -> Tensor:
    """int16 [k, n / 4] -> int8 codes [k, n], the inverse of `int4_quarters` but for its turn."""
    k, quarter = words.shape
    codes = unpack_int4(words.contiguous().view(torch.uint8))
    return codes.view(k, quarter, QUARTERS).transpose(1, 2).reshape(k, QUARTERS * quarter)
