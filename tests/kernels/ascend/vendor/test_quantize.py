"""npu_quantize and npu_dynamic_quant give the codes of their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from panguq.ir.ops.quantize import quantize_per_token
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.dynamic_quant import npu_dynamic_quant
from panguq.kernels.ascend.vendor.int4pack import unpack_words
from panguq.kernels.ascend.vendor.quantize import npu_quantize

QINT8, QUINT4X2 = dtype_number(torch.qint8), dtype_number(torch.quint4x2)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16])


@given(
    k=st.integers(1, 9),
    scale=st.floats(0.01, 300),
    zero_point=st.integers(-128, 127),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
)
def test_static_codes(k: int, scale: float, zero_point: int, dtype: torch.dtype, seed: int) -> None:
    """Against numpy in float64, which rounds half to even too; x * scale is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 8 * k, generator=generator).to(dtype)
    scales, zero_points = torch.tensor([scale]).to(dtype), torch.tensor([zero_point]).to(dtype)
    values = (x.double() * scales.double()).float() + zero_points.float()
    codes = npu_quantize(x, scales, zero_points, QINT8, -1, False)
    assert codes.tolist() == np.clip(np.round(values.double().numpy()), -128, 127).tolist()
    packed = npu_quantize(x, scales, zero_points, QUINT4X2, -1, False)
    expected = np.clip(np.round(values.double().numpy()), -8, 7)
    assert unpack_words(packed).tolist() == expected.tolist()


def test_halves_go_to_even_and_the_zero_point_is_added_before() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5]], dtype=torch.bfloat16)
    one = torch.ones(1, dtype=torch.bfloat16)
    assert npu_quantize(x, one, None, QINT8, -1, False).tolist() == [[0, 2, 2, 0]]
    # 0.5 + 1 = 1.5 becomes 2, where round(0.5) + 1 would be 1.
    assert npu_quantize(x, one, one, QINT8, -1, False).tolist() == [[2, 2, 4, 0]]


def test_scales_per_channel_and_the_axis() -> None:
    x = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    last = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16)
    # Multiplying, any axis but -2 is the last one.
    for axis in (-1, 0, 1, 2):
        codes = npu_quantize(x, last, None, QINT8, axis, False)
        assert codes[1, 2].tolist() == [1, 2, 3, 4]
    middle = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    codes = npu_quantize(x, middle, None, QINT8, -2, False)
    assert codes[1, :, 0].tolist() == [1, 2, 3]


def test_dividing() -> None:
    x = torch.tensor([[3.0, -3.0, 900.0]], dtype=torch.bfloat16)
    scales = torch.tensor([2.0, 2.0, 1.0])
    zero_points = torch.tensor([1, 1, 0], dtype=torch.int32)
    assert npu_quantize(x, scales, zero_points, QINT8, 1).tolist() == [[2, 0, 127]]
    quint8 = dtype_number(torch.quint8)
    assert npu_quantize(x, scales, zero_points, quint8, 1).tolist() == [[2, 0, 255]]
    int32 = dtype_number(torch.int32)
    assert npu_quantize(x, scales, zero_points, int32, 1).tolist() == [[2, 0, 900]]


def test_infinities_become_the_bounds() -> None:
    x = torch.tensor([[float("inf"), float("-inf")]], dtype=torch.bfloat16)
    one = torch.ones(1, dtype=torch.bfloat16)
    assert npu_quantize(x, one, None, QINT8, -1, False).tolist() == [[127, -128]]


@given(tokens=st.integers(1, 5), k=st.integers(1, 20), dtype=DTYPES, seed=st.integers(0, 2**16))
def test_dynamic_codes_are_panguqs_own(tokens: int, k: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 8 * k, generator=generator).to(dtype)
    x[0, 0] = 0
    codes, scale = npu_dynamic_quant(x)
    expected_codes, expected_scale = quantize_per_token(x, 127)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale.unsqueeze(-1), expected_scale)
    assert not codes[0, 0].any()
    packed, scale = npu_dynamic_quant(x, dst_type=QUINT4X2)
    expected_codes, expected_scale = quantize_per_token(x, 7)
    assert torch.equal(unpack_words(packed), expected_codes)
    assert torch.equal(scale.unsqueeze(-1), expected_scale)


@given(k=st.integers(2, 200), dtype=DTYPES, seed=st.integers(0, 2**16))
def test_dynamic_codes_are_within_one_of_the_divided_ones(
    k: int, dtype: torch.dtype, seed: int
) -> None:
    """The documented formula, in float64; another code is next to a half."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, k, generator=generator).to(dtype)
    codes, scale = npu_dynamic_quant(x)
    exact_scale = x.double().abs().amax(-1) / 127
    torch.testing.assert_close(scale.double(), exact_scale, rtol=2**-23, atol=0)
    exact = x.double() / exact_scale[:, None]
    assert ((codes.double() - exact).abs() <= 0.5 + 127 * 2**-22).all()
    assert codes.abs().amax(-1).tolist() == [127] * 3


def test_smooth_scales_multiply_before_the_maximum_is_taken() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float16)
    smooth = torch.tensor([8.0, 2.0, 1.0, 0.125], dtype=torch.float16)
    codes, scale = npu_dynamic_quant(x, smooth_scales=smooth)
    assert codes.tolist() == [[127, 64, 64, 16]]
    assert scale.tolist() == pytest.approx([8 / 127])
