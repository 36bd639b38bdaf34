"""19-bit scales and 9-bit offsets in an int64, bit by bit."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from panguq.kernels.ascend.vendor.trans_quant_param import (
    npu_trans_quant_param,
    offset_of,
    scale_of,
)

NORMAL_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(
    lambda x: abs(x) > 1e-35
)


def bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def test_one_scale_bit_by_bit() -> None:
    scale = torch.tensor([1.0, -1.5, 0.1])
    parameter = npu_trans_quant_param(scale)
    assert [hex(value) for value in parameter.tolist()] == [
        "0x40003f800000",
        "0x4000bfc00000",
        "0x40003dccc000",  # 0.1 is 3dcccccd
    ]
    assert scale_of(parameter).tolist() == [1.0, -1.5, 0.0999755859375]


@given(st.lists(NORMAL_FLOATS, min_size=1, max_size=20), st.sampled_from([0, 1]))
def test_the_scale_keeps_ten_bits_of_mantissa(scales: list[float], round_mode: int) -> None:
    result = scale_of(npu_trans_quant_param(torch.tensor(scales), None, round_mode))
    for scale, stored in zip(scales, result.tolist(), strict=True):
        low = bits(scale) & 0xFFFFE000
        if round_mode == 0:
            expected = low
        else:
            dropped = bits(scale) & 0x1FFF
            up = dropped > 0x1000 or (dropped == 0x1000 and low & 0x2000)
            expected = low + (0x2000 if up else 0)
        assert bits(stored) == expected


@pytest.mark.parametrize(
    ("offset", "stored"),
    [(0.0, 0), (3.4, 3), (-3.4, -3), (2.5, 3), (-2.5, -3), (255.0, 255), (1e9, 255), (-1e9, -256)],
)
def test_the_offset_is_a_whole_number_of_nine_bits(offset: float, stored: int) -> None:
    parameter = npu_trans_quant_param(torch.tensor([0.5]), torch.tensor([offset]))
    assert offset_of(parameter).tolist() == [stored]
    assert scale_of(parameter).tolist() == [0.5]
    assert parameter.item() >> 46 == 1
    assert parameter.item() >> 37 & 0x1FF == stored % 512


def test_one_offset_may_go_with_many_scales_and_the_other_way_round() -> None:
    scales, offsets = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, -1.0])
    assert offset_of(npu_trans_quant_param(scales, offsets[:1])).tolist() == [1, 1, 1]
    both = npu_trans_quant_param(scales[:1], offsets)
    assert offset_of(both).tolist() == [1, -1]
    assert scale_of(both).tolist() == [1.0, 1.0]


def test_a_raw_float_in_the_low_half_is_cut_when_it_is_read() -> None:
    """Checkpoints hold such numbers: the hardware does not read the low 13 bits."""
    assert scale_of(torch.tensor([bits(0.1)])).item() == 0.0999755859375
