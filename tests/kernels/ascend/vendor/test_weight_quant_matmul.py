"""npu_weight_quant_batchmatmul: weights rounded once, float32 sums, results rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panguq.kernels.ascend.vendor.int4pack import pack_words
from panguq.kernels.ascend.vendor.weight_quant_matmul import (
    BIAS_DTYPE,
    antiquantize,
    npu_weight_quant_batchmatmul,
)
from tests.kernels.ascend.rounding import EPSILON, half_unit
from tests.kernels.conftest import AssertClose

DTYPES = st.sampled_from([torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**16)


def exact_weight(codes: Tensor, scale: Tensor, offset: Tensor | None, group: int) -> Tensor:
    """(codes + offset) * scale in float64: unrounded."""
    if group:
        rows = torch.arange(codes.shape[0]) // group
        scale, offset = scale[rows], None if offset is None else offset[rows]
    shifted = codes.double() + (0 if offset is None else offset.double())
    return shifted * scale.double()


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([0, 32, 64]),
    k=st.integers(65, 200),
    dtype=DTYPES,
    with_offset=st.booleans(),
    seed=SEEDS,
)
def test_the_weight_is_the_exact_one_rounded_once(
    bits: int, group: int, k: int, dtype: torch.dtype, with_offset: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (k, 16), dtype=torch.int8, generator=generator)
    shape = (-(-k // group), 16) if group else (16,)
    scale = torch.rand(shape, generator=generator).to(dtype)
    offset = None
    if with_offset:
        offset = torch.randint(-limit, limit + 1, shape, generator=generator).to(dtype)
    weight = antiquantize(codes, scale, offset, group, dtype)
    exact = exact_weight(codes, scale, offset, group)
    assert torch.equal(weight, exact.to(torch.float32).to(dtype))
    assert torch.equal(exact.to(torch.float32).double(), exact)  # so that it was rounded once


@given(
    m=st.integers(1, 20),
    k=st.sampled_from([40, 96, 576, 1500]),
    packed=st.booleans(),
    group=st.sampled_from([0, 32]),
    dtype=DTYPES,
    with_bias=st.booleans(),
    seed=SEEDS,
)
@settings(max_examples=80)
def test_the_result_is_within_the_bound_of_a_float32_sum(
    m: int, k: int, packed: bool, group: int, dtype: torch.dtype, with_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    limit = 8 if packed else 128
    codes = torch.randint(-limit, limit, (k, 24), dtype=torch.int8, generator=generator)
    x = torch.randn(m, k, generator=generator).to(dtype)
    scale = torch.rand(-(-k // group) if group else 1, 24, generator=generator).to(dtype)
    bias = None
    if with_bias:
        bias = torch.randn(24, generator=generator).mul(10).to(BIAS_DTYPE[dtype])
    weight = pack_words(codes) if packed else codes
    result = npu_weight_quant_batchmatmul(x, weight, scale, None, None, None, bias, group)
    rounded = antiquantize(codes, scale, None, group, dtype).double()
    exact, size = x.double() @ rounded, x.double().abs() @ rounded.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    # k products and sums in float32, then half a unit of the result's dtype.
    bound = half_unit(exact, dtype) + (k + 1) * 2**-24 * size * (1 + EPSILON[dtype])
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= bound).all()


def test_the_offset_is_added_not_subtracted() -> None:
    x = torch.eye(32, dtype=torch.bfloat16)
    weight = torch.zeros(32, 8, dtype=torch.int8)
    scale = torch.full((8,), 2.0, dtype=torch.bfloat16)
    offset = torch.full((8,), -3.0, dtype=torch.bfloat16)
    result = npu_weight_quant_batchmatmul(x, weight, scale, offset)
    assert result.unique().tolist() == [-6.0]


@pytest.mark.parametrize("dtype", BIAS_DTYPE)
def test_a_transposed_int8_weight_is_read_by_its_strides(
    dtype: torch.dtype, assert_close: AssertClose
) -> None:
    x = torch.randn(5, 64).to(dtype)
    stored = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    scale = torch.rand(16).to(dtype)
    plain = npu_weight_quant_batchmatmul(x, stored.t().contiguous(), scale)
    assert_close(plain, npu_weight_quant_batchmatmul(x, stored.t(), scale), 45)


def test_bias_is_added_before_the_only_rounding() -> None:
    """There is no bfloat16 257: rounding before the bias is added would give 256 - 255.5."""
    x = torch.tensor([[1.0, 0.25]], dtype=torch.bfloat16)
    weight = torch.tensor([[64], [1]], dtype=torch.int8)
    scale = torch.tensor([4.0], dtype=torch.bfloat16)
    bias = torch.tensor([-255.5])
    result = npu_weight_quant_batchmatmul(x, weight, scale, None, None, None, bias)
    assert result.tolist() == [[1.5]]
