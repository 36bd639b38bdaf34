"""Every expert's rows meet that expert's kernel, and nobody else's weights are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from panguq.ir.ops.packing import pack_int4
from panguq.ir.ops.quantize import quantize_per_token, quantize_weight
from panguq.kernels.cpu import expert_linear, int8_linear
from panguq.kernels.cpu.dequantized_linear import reference
from tests.kernels.expert_calls import EXPERT_CALLS

EXPERTS, N, K, GROUP = 4, 32, 64, 32
COUNTS = torch.tensor([2, 0, 5, 1])
ROWS = [slice(0, 2), slice(2, 2), slice(2, 7), slice(7, 8)]


def weights(quant_max: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes `[experts, n, k]` and scales; expert 1, which gets nothing, has NaN for scales."""
    torch.manual_seed(0)
    weight = torch.randn(EXPERTS, N, K)
    scale = weight.unflatten(2, (-1, group_size)).abs().amax(-1) / quant_max
    codes = quantize_weight(weight, scale, None, group_size, -quant_max, quant_max)
    scale[1] = torch.nan
    return codes, scale


X, BIAS = torch.randn(8, K, generator=torch.Generator().manual_seed(1)), torch.ones(EXPERTS, N)


def test_int8() -> None:
    codes, scale = weights(127, K)
    x, steps = quantize_per_token(X, 127)
    args = (x, steps, None, codes, scale, None, BIAS, torch.float32, COUNTS)
    result = expert_linear.expert_int8_linear(*args)
    for expert, rows in enumerate(ROWS):
        stored = (codes[expert], scale[expert], None, BIAS[expert], torch.float32)
        assert torch.equal(
            result[rows], int8_linear.int8_linear(x[rows], steps[rows], None, *stored)
        )


@pytest.mark.parametrize("few_tokens", [0, 8])
def test_weights_alone(few_tokens) -> None:
    codes, scale = weights(127, K)
    eight = expert_linear.expert_int8_weight_linear(X, codes, scale, BIAS, few_tokens, COUNTS)
    check(eight, codes, scale, K)
    codes, scale = weights(7, GROUP)
    scale = scale.bfloat16()
    packed = pack_int4(codes)
    kernel = expert_linear.expert_int4_kernel_weight(packed)
    scales = expert_linear.expert_int4_kernel_scales(scale, None)
    grid = (packed, scale, None, GROUP, BIAS, few_tokens, COUNTS)
    check(expert_linear.expert_int4_linear(X, kernel, scales, *grid), codes, scale, GROUP)
    args = (packed, scale, None, GROUP, BIAS, torch.float32, COUNTS)
    plain = expert_linear.expert_dequantized_linear(X, *args)
    check(plain, codes, scale, GROUP, tolerance=1e-5)


def check(
    result: Tensor, codes: Tensor, scale: Tensor, group_size: int, tolerance: float = 2e-2
) -> None:
    for expert, rows in enumerate(ROWS):
        grid = (codes[expert], scale[expert], None, group_size)
        expected = reference(X[rows], *grid, BIAS[expert])
        torch.testing.assert_close(result[rows], expected, rtol=tolerance, atol=tolerance * 20)


@pytest.mark.parametrize("name", [n for n in EXPERT_CALLS if n.endswith("linear")])
def test_of_some_experts_rows_of_others_are_zero(name: str) -> None:
    """Two calls with the weights of some experts each add up to the one with those of all."""
    op, make = EXPERT_CALLS[name]
    torch.manual_seed(0)
    given = make(8)
    whole, per_row = op(**given), ("x", "codes", "act_scale", "counts")
    total = torch.zeros_like(whole)
    for members in ([0, 1], [2]):
        own = {
            key: value[members] if torch.is_tensor(value) and key not in per_row else value
            for key, value in given.items()
        }
        if name == "expert_dequantized_linear":  # whose codes are the weight
            own["codes"] = given["codes"][members]
        total += op(**own, members=members)
    assert torch.equal(total, whole)


def test_no_rows_at_all() -> None:
    codes, scale = weights(127, K)
    nobody = torch.zeros(EXPERTS, dtype=torch.int64)
    args = (X[:0], codes, scale, BIAS, 8, nobody)
    assert expert_linear.expert_int8_weight_linear(*args).shape == (0, N)
