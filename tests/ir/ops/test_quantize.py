"""Quantization against plain numpy loops, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.library import opcheck

from panguq.ir.ops.quantize import (
    dequantize,
    dequantize_weight,
    quantize_per_tensor,
    quantize_per_token,
    quantize_weight,
)

F32 = np.float32
FINITE = st.floats(-(2.0**99), 2.0**99, width=32)
TOKENS = arrays(F32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=FINITE)


@given(x=TOKENS, quant_max=st.sampled_from([1, 7, 127]))
@settings(deadline=None, max_examples=200)
def test_quantize_per_token_is_bit_exact(x, quant_max):
    codes, scale = quantize_per_token(torch.from_numpy(x), quant_max)
    for row, row_codes, row_scale in zip(x, codes.numpy(), scale.numpy(), strict=True):
        expected_scale = F32(max(np.abs(row).max(), F32(1e-30))) / F32(quant_max)
        assert row_scale[0] == expected_scale
        reciprocal = F32(1) / expected_scale
        assert row_codes.tolist() == [int(np.rint(value * reciprocal)) for value in row]
        assert np.abs(row_codes).max() <= quant_max


@given(
    x=TOKENS,
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    zero_point=st.integers(-128, 127),
    bounds=st.sampled_from([(-128, 127), (-127, 127), (-8, 7)]),
)
@settings(deadline=None, max_examples=200)
def test_quantize_per_tensor_is_bit_exact(x, scale, zero_point, bounds):
    codes = quantize_per_tensor(
        torch.from_numpy(x), torch.tensor([scale]), torch.tensor([zero_point]).int(), *bounds
    )
    reciprocal = F32(1) / F32(scale)
    with np.errstate(over="ignore"):
        expected = [
            [int(np.clip(np.rint(value * reciprocal + F32(zero_point)), *bounds)) for value in row]
            for row in x
        ]
    assert codes.tolist() == expected


def test_the_zero_point_is_added_before_rounding():
    x, step, zero = torch.tensor([0.5, 1.5]), torch.ones(1), torch.ones(1, dtype=torch.int32)
    assert quantize_per_tensor(x, step, zero, -128, 127).tolist() == [2, 2]


def test_the_factor_is_rounded_to_the_dtype_of_the_input():
    x, step = torch.tensor([85.0]).bfloat16(), torch.tensor([0.7])
    zero = torch.zeros(1, dtype=torch.int32)
    factor = float(torch.tensor(1 / 0.7).bfloat16())
    assert round(85 * factor) != round(85 / 0.7)
    assert quantize_per_tensor(x, step, zero, -128, 127).tolist() == [round(85 * factor)]


def test_halves_round_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]])
    assert quantize_per_token(x, 127)[0].tolist() == [[0, 2, 2, 0, -2, 127]]


def test_a_zero_token_gives_zero_codes_and_a_finite_scale():
    codes, scale = quantize_per_token(torch.zeros(2, 8), 127)
    assert not codes.any()
    assert scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")])
def test_a_fault_in_one_token_shows_in_its_result_and_in_no_other(fault):
    x = torch.ones(2, 8)
    x[0, 3] = fault
    codes, scale = quantize_per_token(x, 127)
    result = dequantize(codes, scale, None, torch.float32)
    assert not result[0].isfinite().all()
    assert torch.equal(result[1], torch.ones(8))


def test_infinities_saturate_per_tensor():
    x = torch.tensor([float("inf"), -float("inf")])
    codes = quantize_per_tensor(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), -128, 127)
    assert codes.tolist() == [127, -128]


def test_no_tokens_give_no_codes():
    codes, scale = quantize_per_token(torch.empty(0, 8), 127)
    assert codes.shape == (0, 8) and scale.shape == (0, 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [4, 12])
def test_weights_are_quantized_group_by_group(group_size, symmetric):
    weight, scale = torch.randn(5, 12), torch.rand(5, 12 // group_size).bfloat16() + 0.1
    zero_point = None if symmetric else torch.randint(-3, 4, scale.shape, dtype=torch.int8)
    codes = quantize_weight(weight, scale, zero_point, group_size, -8, 7)
    back = dequantize_weight(codes, scale, zero_point, group_size, torch.float32)
    for row in range(5):
        for column in range(12):
            group = column // group_size
            group_scale = F32(scale[row, group].item())
            offset = 0 if zero_point is None else zero_point[row, group].item()
            rounded = np.rint(F32(weight[row, column].item()) / group_scale)
            code = int(np.clip(rounded + offset, -8, 7))
            assert codes[row, column] == code
            assert back[row, column] == F32(code - offset) * group_scale


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_agree_with_bodies(shape, dtype):
    x, one = torch.randn(shape).to(dtype), torch.ones(1)
    zero = torch.zeros(1, dtype=torch.int32)
    opcheck(quantize_per_token, (x, 127))
    opcheck(quantize_per_tensor, (x, one, zero, -128, 127))
    codes, scale = quantize_per_token(x, 127)
    opcheck(dequantize, (codes, scale, None, dtype))
    opcheck(dequantize, (codes, one, zero, dtype))
    weight, weight_scale = x.reshape(6, 8), torch.ones(6, 2)
    opcheck(quantize_weight, (weight, weight_scale, None, 4, -8, 7))
    opcheck(dequantize_weight, (codes.reshape(6, 8), weight_scale, None, 4, dtype))


def test_a_transposed_input_is_quantized_by_position():
    x = torch.randn(8, 6)
    codes, _ = quantize_per_token(x.t(), 127)
    assert torch.equal(codes, quantize_per_token(x.t().contiguous(), 127)[0])
