"""W8A16: both ways through the op against float64, within bfloat16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from panguq.kernels.cpu import dequantized_linear
from panguq.kernels.cpu.int8_weight_linear import int8_weight_linear, refusal

BYTES, CONVERTED = 10**6, 0  # few_tokens: always read bytes, never read bytes


def reference(x, weight, scale, bias):
    return dequantized_linear.reference(x, weight, scale[:, None], None, weight.shape[1], bias)


def problem(*tokens, n=33, k=64, dtype=torch.float32, with_bias=True):
    x = (torch.randn(*tokens, k) + 0.3).to(dtype)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return x, weight, torch.rand(n) * 0.01, torch.randn(n) if with_bias else None


@given(m=st.integers(1, 70), n=st.integers(1, 70), k16=st.integers(1, 8))
@settings(deadline=None, max_examples=100)
def test_every_shape(assert_close, m, n, k16):
    """With bfloat16 inputs only the result is rounded, so the bound holds for every draw."""
    x, weight, scale, _ = problem(m, n=n, k=16 * k16)
    x = x.bfloat16().float()
    for few_tokens in (BYTES, CONVERTED, 8):
        result = int8_weight_linear(x, weight, scale, None, few_tokens)
        assert_close(reference(x, weight, scale, None), result, 45)


@pytest.mark.parametrize("few_tokens", [BYTES, CONVERTED])
@pytest.mark.parametrize("tokens", [(16,), (2, 5), (0,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_fake(assert_close, few_tokens, tokens, dtype, with_bias):
    arguments = problem(*tokens, dtype=dtype, with_bias=with_bias)
    assert_close(reference(*arguments), int8_weight_linear(*arguments, few_tokens), 45)
    opcheck(int8_weight_linear, (*arguments, few_tokens))


def test_weights_at_an_odd_address(assert_close):
    x, weight, scale, _ = problem(4)
    odd = torch.empty(weight.numel() + 1, dtype=torch.int8)[1:].view(weight.shape).copy_(weight)
    expected = int8_weight_linear(x, weight, scale, None, BYTES)
    assert torch.equal(int8_weight_linear(x, odd, scale, None, BYTES), expected)


def test_converting_takes_what_the_byte_kernel_refuses(assert_close):
    assert "multiple of 16" in refusal(1, 8, 40)
    assert refusal(None, 7, 48) is None
    arguments = problem(3, k=41)
    assert_close(reference(*arguments), int8_weight_linear(*arguments, CONVERTED), 45)
