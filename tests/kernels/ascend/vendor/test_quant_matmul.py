"""npu_quant_matmul: exact sums, scales as the hardware reads them, one rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.int4pack import pack_words
from panguq.kernels.ascend.vendor.quant_matmul import npu_quant_matmul
from panguq.kernels.ascend.vendor.trans_quant_param import npu_trans_quant_param, scale_of
from panguq.kernels.cpu.int8_linear import int32_matmul
from tests.kernels.ascend.rounding import EPSILON, half_unit

OUTPUTS = st.sampled_from([torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**16)


def codes(generator: torch.Generator, *shape: int, limit: int = 128) -> Tensor:
    return torch.randint(-limit, limit, shape, dtype=torch.int8, generator=generator)


def floats(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) * 0.01 + 1e-4


def assert_rounded_once(result: Tensor, exact: Tensor, float32_steps: float) -> None:
    """The result is float64's `exact` within half a unit of its dtype and the float32 steps.

    `float32_steps` bounds the error of the float32 arithmetic before, in units of its epsilon.
    """
    dtype = result.dtype
    bound = half_unit(exact, dtype) + float32_steps * 2**-24 * (1 + EPSILON[dtype])
    assert ((result.double() - exact).abs() <= bound).all()


def number(dtype: torch.dtype) -> int:
    return dtype_number(dtype)


@given(m=st.integers(1, 9), n=st.integers(1, 20), k=st.integers(1, 300), seed=SEEDS)
def test_int32_output_is_the_exact_sum_and_bias(m: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x1, x2 = codes(generator, 2, m, k), codes(generator, k, n)
    bias = torch.randint(-(2**20), 2**20, (n,), dtype=torch.int32, generator=generator)
    result = npu_quant_matmul(
        x1, x2, torch.full((n,), 7.0), bias=bias, output_dtype=number(torch.int32)
    )
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), x1.long() @ x2.long() + bias)


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("k", [1, 2, 576, 4096])
def test_extreme_codes_sum_exactly(value: int, k: int) -> None:
    x1, x2 = torch.full((3, k), -128, dtype=torch.int8), torch.full((k, 17), value).to(torch.int8)
    assert int32_matmul(x1, x2.t()).unique().tolist() == [-128 * value * k]


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 20),
    k=st.integers(1, 300),
    output=OUTPUTS,
    bias_kind=st.sampled_from([None, torch.int32, torch.float32]),
    seed=SEEDS,
)
def test_per_token(
    m: int, n: int, k: int, output: torch.dtype, bias_kind: torch.dtype | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x1, x2 = codes(generator, m, k), codes(generator, k, n)
    scale, pertoken = floats(generator, n), floats(generator, m)
    bias = None
    if bias_kind is not None:
        bias = (torch.randn(n, generator=generator) * 100).to(bias_kind)
    result = npu_quant_matmul(
        x1, x2, scale, pertoken_scale=pertoken, bias=bias, output_dtype=number(output)
    )
    total = x1.long() @ x2.long()
    if bias_kind == torch.int32:
        total += bias
    exact = total.double() * scale.double() * pertoken.double()[:, None]
    steps = 4 * exact.abs()
    if bias_kind == torch.float32:
        exact = exact + bias.double()
        steps = steps + exact.abs()
    assert_rounded_once(result, exact, steps)


@given(m=st.integers(1, 9), n=st.integers(1, 20), k=st.integers(1, 300), seed=SEEDS)
def test_a_float16_result_uses_the_19_bits_of_an_int64_scale(
    m: int, n: int, k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x1, x2, scale = codes(generator, m, k), codes(generator, k, n), floats(generator, n)
    bias = torch.randint(-1000, 1000, (n,), dtype=torch.int32, generator=generator)
    parameter = npu_trans_quant_param(scale)
    result = npu_quant_matmul(x1, x2, parameter, bias=bias, output_dtype=number(torch.float16))
    total = (x1.long() @ x2.long() + bias).double()
    exact = total * scale_of(parameter).double()
    assert_rounded_once(result, exact, 2 * exact.abs())
    # torch_npu converts a float32 scale itself: the same result.
    converted = npu_quant_matmul(x1, x2, scale, bias=bias, output_dtype=number(torch.float16))
    assert torch.equal(converted, result)


def test_the_cut_scale_makes_a_difference() -> None:
    x1, x2 = torch.full((1, 8), 64, dtype=torch.int8), torch.full((8, 1), 4, dtype=torch.int8)
    scale, float16 = torch.tensor([1.0009]), number(torch.float16)
    cut = npu_quant_matmul(x1, x2, scale, output_dtype=float16)
    whole = npu_quant_matmul(x1, x2, scale, pertoken_scale=torch.ones(1), output_dtype=float16)
    assert cut.item() == 2048.0  # the next scale of 10 bits above 1 is 1.00098
    assert whole.item() == 2050.0  # 2049.84


@given(m=st.integers(1, 9), n=st.integers(1, 20), k=st.integers(1, 300), seed=SEEDS)
def test_static_bfloat16_uses_the_whole_float32_scale(m: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x1, x2, scale = codes(generator, 1, m, k), codes(generator, k, n), floats(generator, n)
    bias = torch.randint(-1000, 1000, (n,), dtype=torch.int32, generator=generator)
    result = npu_quant_matmul(x1, x2, scale, bias=bias, output_dtype=number(torch.bfloat16))
    exact = (x1.long() @ x2.long() + bias).double() * scale.double()
    assert_rounded_once(result, exact, 2 * exact.abs())


def test_int8_output_rounds_then_adds_the_offset_then_clamps() -> None:
    x1 = torch.tensor([[1], [3], [5], [127]], dtype=torch.int8)
    x2 = torch.tensor([[1]], dtype=torch.int8)
    scale, offset = torch.tensor([0.5]), torch.tensor([1.0])
    expected = [[1], [3], [3], [65]]  # 0.5, 1.5, 2.5 and 63.5 round to even
    assert npu_quant_matmul(x1, x2, npu_trans_quant_param(scale, offset)).tolist() == expected
    assert npu_quant_matmul(x1, x2, scale, offset=offset).tolist() == expected
    large = npu_trans_quant_param(torch.tensor([4.0]), torch.tensor([-200.0]))
    assert npu_quant_matmul(x1, x2, large).tolist() == [[-128], [-128], [-128], [127]]


@given(m=st.integers(1, 6), n=st.integers(1, 3), k=st.integers(1, 20), output=OUTPUTS, seed=SEEDS)
def test_int4_by_int4(m: int, n: int, k: int, output: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x1, x2 = codes(generator, m, 8 * k, limit=8), codes(generator, 8 * k, 8 * n, limit=8)
    scale, pertoken = floats(generator, 8 * n), floats(generator, m)
    result = npu_quant_matmul(
        pack_words(x1), pack_words(x2), scale, pertoken_scale=pertoken, output_dtype=number(output)
    )
    exact = (x1.long() @ x2.long()).double() * scale.double() * pertoken.double()[:, None]
    assert_rounded_once(result, exact, 4 * exact.abs())


class Int8ByInt4:
    """Random int8 activations and int4 weights with one scale per 256 inputs."""

    def __init__(self, m: int, n: int, groups: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = codes(generator, m, 256 * groups)
        self.weight = codes(generator, 256 * groups, n, limit=8)
        flat = npu_trans_quant_param(floats(generator, groups * n))
        self.scale = flat.view(groups, n)
        self.pertoken = floats(generator, m, 1)
        scales = scale_of(self.scale).double().repeat_interleave(256, dim=0)
        self.scaled_weight = self.weight.double() * scales
        self.offset = (8 * self.scaled_weight.sum(dim=0)).to(torch.float32)

    def run(self, offset: Tensor, output: torch.dtype) -> Tensor:
        return npu_quant_matmul(
            self.x,
            pack_words(self.weight),
            self.scale,
            offset=offset,
            pertoken_scale=self.pertoken,
            output_dtype=number(output),
        )


@given(
    m=st.integers(1, 6),
    n=st.sampled_from([8, 24]),
    groups=st.integers(1, 4),
    output=OUTPUTS,
    seed=SEEDS,
)
@settings(max_examples=30)
def test_int8_by_int4_with_the_right_offset_is_the_plain_product(
    m: int, n: int, groups: int, output: torch.dtype, seed: int
) -> None:
    case = Int8ByInt4(m, n, groups, seed)
    exact = (case.x.double() @ case.scaled_weight) * case.pertoken.double()
    result = case.run(case.offset, output)
    # What is added up: at most 136 * |w * s| for each input, and the offset.
    added = (136 * case.scaled_weight.abs().sum(0) + case.offset.abs()) * case.pertoken.double()
    assert_rounded_once(result, exact, (groups + 4) * added)


def test_int8_by_int4_with_a_wrong_offset_is_wrong_by_it() -> None:
    """(x1 - 8) @ (w * s) + offset: without the offset, 8 * sum_k w * s is missing."""
    case = Int8ByInt4(m=4, n=16, groups=2, seed=3)
    right = case.run(case.offset, torch.bfloat16)
    exact = (case.x.double() @ case.scaled_weight) * case.pertoken.double()
    shifted = ((case.x.double() - 8) @ case.scaled_weight) * case.pertoken.double()
    none = case.run(torch.zeros(16), torch.bfloat16)
    assert not torch.equal(none, right)
    assert_rounded_once(none, shifted, 1e4 * 136)
    twice = case.run(2 * case.offset, torch.bfloat16)
    expected = exact + case.offset.double() * case.pertoken.double()
    assert_rounded_once(twice, expected, 1e4 * 136)
