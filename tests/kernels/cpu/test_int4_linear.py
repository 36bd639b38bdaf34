"""W4A16: both ops against float64, within bfloat16, with outliers and a mean in the input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from panguq.ir.ops.packing import pack_int4, unpack_int4
from panguq.ir.ops.quantize import dequantize_weight, quantize_weight
from panguq.kernels.cpu import dequantized_linear as module
from panguq.kernels.cpu.dequantized_linear import dequantized_linear, reference
from panguq.kernels.cpu.int4_linear import (
    int4_kernel_scales,
    int4_kernel_weight,
    int4_linear,
    refusal,
)


def tokens_with_outliers(*shape):
    x = torch.randn(shape) + 0.5
    x[..., 5] *= 30
    return x


def canonical(n, k, group_size, symmetric):
    """A quantized weight: packed codes, scale, zero point."""
    weight = torch.randn(n, k) * 0.05
    groups = weight.view(n, -1, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    zero_point = None
    if symmetric:
        scale = groups.abs().amax(-1) / 7
    else:
        scale = (high - low) / 15
        zero_point = (-8 - low / scale).round().clamp(-8, 7).to(torch.int8)
    codes = quantize_weight(weight, scale, zero_point, group_size, -8, 7)
    return pack_int4(codes), scale, zero_point


def kernel_weight_of(packed, scale, zero_point, group_size):
    """The weight that the kernel is documented to use: code * scale + offset, both rounded."""
    rounded, offset = int4_kernel_scales(scale, zero_point).double().transpose(0, 1).unbind(-1)
    codes = unpack_int4(packed).view(*scale.shape, group_size)
    return (codes * rounded.unsqueeze(-1) + offset.unsqueeze(-1)).flatten(1)


def run_dequantized(x, packed, scale, zero_point, group_size, bias, dtype=torch.bfloat16):
    return dequantized_linear(x, packed, scale, zero_point, group_size, bias, dtype)


def run_kernel(x, packed, scale, zero_point, group_size, bias, few_tokens=2**31 - 1):
    layout = int4_kernel_weight(packed), int4_kernel_scales(scale, zero_point)
    return int4_linear(x, *layout, packed, scale, zero_point, group_size, bias, few_tokens)


@given(
    m=st.integers(1, 70),
    n16=st.integers(1, 9),
    group_size=st.sampled_from([32, 64, 128, 256]),
    groups=st.integers(1, 3),
    symmetric=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_every_shape(assert_close, m, n16, group_size, groups, symmetric):
    n, k = 16 * n16, groups * group_size
    assert refusal(m, n, k, group_size) is None
    x, weight = (
        tokens_with_outliers(m, k).bfloat16().float(),
        canonical(n, k, group_size, symmetric),
    )
    expected = (x.double() @ kernel_weight_of(*weight, group_size).t()).float()
    assert_close(expected, run_kernel(x, *weight, group_size, None), 45)
    rounded = dequantize_weight(unpack_int4(weight[0]), *weight[1:], group_size, torch.bfloat16)
    expected = (x.double() @ rounded.double().t()).float()
    assert_close(expected, run_dequantized(x, *weight, group_size, None), 45)


@pytest.mark.parametrize("mean", [1, 10, 100])
def test_a_large_mean_does_not_drown_the_zero_points(assert_close, mean):
    x, weight = tokens_with_outliers(16, 576) + mean, canonical(64, 576, 32, symmetric=False)
    assert_close(reference(x, *weight, 32, None), run_kernel(x, *weight, 32, None), 45)


def test_symmetric_weights_are_exact_where_bfloat16_is():
    """Codes times powers of two, summed over one input: nothing is rounded."""
    codes = torch.arange(-8, 8, dtype=torch.int8).view(16, 1).expand(16, 32)
    x = torch.eye(32)[:4]
    scale = torch.full((16, 1), 0.25)
    result = run_kernel(x, pack_int4(codes.contiguous()), scale, None, 32, None)
    assert torch.equal(result, (codes[:, :4] * 0.25).t())


@pytest.mark.parametrize("tokens", [(16,), (2, 5), (0,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_fake(assert_close, tokens, dtype, with_bias):
    x, weight = tokens_with_outliers(*tokens, 96).to(dtype), canonical(48, 96, 32, False)
    bias = torch.randn(48) if with_bias else None
    expected = reference(x, *weight, 32, bias)
    assert_close(expected, run_kernel(x, *weight, 32, bias), 45)
    assert_close(expected, run_dequantized(x, *weight, 32, bias), 45)
    packed, scale, zero_point = weight
    layout = int4_kernel_weight(packed), int4_kernel_scales(scale, zero_point)
    for few_tokens in (0, 100):
        opcheck(int4_linear, (x, *layout, *weight, 32, bias, few_tokens))
    opcheck(dequantized_linear, (x, *weight, 32, bias, torch.bfloat16))


def test_packing_permutes_nibbles_and_its_fakes_agree():
    packed, scale, zero_point = canonical(80, 64, 32, symmetric=False)
    nibbles = int4_kernel_weight(packed)
    count = torch.bincount(torch.cat((packed & 15, packed >> 4)).flatten().int() ^ 8, minlength=16)
    after = torch.bincount(torch.cat((nibbles & 15, nibbles >> 4)).flatten().int(), minlength=16)
    assert torch.equal(count, after)
    opcheck(int4_kernel_weight, (packed,))
    opcheck(int4_kernel_scales, (scale, zero_point))
    opcheck(int4_kernel_scales, (scale, None))


def test_refusals_name_the_reason():
    assert "group size 48" in refusal(1, 64, 96, 48)
    assert "k=100" in refusal(1, 64, 100, 32)
    assert "n=40" in refusal(1, 40, 64, 32)
    assert refusal(None, 48, 96, 32) is None


def test_the_dequantizing_op_takes_what_the_kernel_refuses(assert_close):
    x, weight = tokens_with_outliers(16, 30), canonical(7, 30, 10, symmetric=False)
    expected = reference(x, *weight, 10, None)
    assert_close(expected, run_dequantized(x, *weight, 10, None), 45)


@given(
    rows_per_piece=st.integers(0, 60),
    rows_per_step=st.integers(0, 60),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_a_weight_dequantized_in_pieces_gives_every_output(
    assert_close, rows_per_piece, rows_per_step, bits, symmetric
):
    packed, scale, zero_point = canonical(50, 64, 32, symmetric)
    weight = (packed if bits == 4 else unpack_int4(packed)), scale, zero_point
    x = tokens_with_outliers(2, 3, 64)
    whole = run_dequantized(x, *weight, 32, None, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WEIGHTS_PER_PIECE", 64 * rows_per_piece)
        patch.setattr(module, "WEIGHTS_PER_STEP", 64 * rows_per_step)
        assert_close(whole, run_dequantized(x, *weight, 32, None, torch.float32), 100)


@given(
    few_tokens=st.integers(0, 6),
    symmetric=st.booleans(),
    group_size=st.sampled_from([32, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_bias=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_both_sides_of_few_tokens(
    assert_close, few_tokens, symmetric, group_size, dtype, with_bias
):
    """Beyond few_tokens the result is `dequantized_linear`'s to the bit; up to it, the kernel's."""
    weight = canonical(48, 128, group_size, symmetric)
    bias = torch.randn(48) if with_bias else None
    for m in {1, max(1, few_tokens), few_tokens + 1, 2 * few_tokens + 2}:
        x = tokens_with_outliers(m, 128).to(dtype)
        found = run_kernel(x, *weight, group_size, bias, few_tokens)
        one = run_dequantized if m > few_tokens else run_kernel
        assert torch.equal(found, one(x, *weight, group_size, bias))
        assert_close(reference(x, *weight, group_size, bias), found, 45)


def test_few_tokens_read_the_layout_and_many_the_stored_codes():
    packed, scale, _ = canonical(48, 64, 32, symmetric=True)
    layout = int4_kernel_weight(packed), int4_kernel_scales(scale, None)
    wrong_layout = torch.zeros_like(layout[0]), torch.zeros_like(layout[1])
    few, many = torch.randn(4, 64), torch.randn(5, 64)
    stored = (packed, scale, None, 32, None, 4)
    damaged = (torch.zeros_like(packed), torch.zeros_like(scale), None, 32, None, 4)
    assert torch.equal(int4_linear(few, *layout, *stored), int4_linear(few, *layout, *damaged))
    expected = int4_linear(many, *layout, *stored)
    assert torch.equal(expected, int4_linear(many, *wrong_layout, *stored))
    assert not torch.equal(expected, int4_linear(many, *layout, *damaged))


@pytest.mark.parametrize("bits", [4, 8])
def test_float32_is_exact_to_float32(assert_close, bits):
    packed, scale, zero_point = canonical(50, 64, 32, symmetric=False)
    codes = packed if bits == 4 else unpack_int4(packed)
    x = tokens_with_outliers(16, 64)
    result = dequantized_linear(x, codes, scale, zero_point, 32, None, torch.float32)
    assert_close(reference(x, codes, scale, zero_point, 32, None), result, 100)
