"""The norms: float32 inside, and rounded exactly where their docstrings say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.int4pack import unpack_words
from panguq.kernels.ascend.vendor.rms_norm import npu_add_rms_norm, npu_rms_norm
from panguq.kernels.ascend.vendor.rms_norm_quant import (
    npu_add_rms_norm_dynamic_quant,
    npu_add_rms_norm_quant,
)
from tests.kernels.ascend.rounding import EPSILON, half_unit

HALVES = st.sampled_from([torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**16)
EPS = 1e-5


def tensors(dtype: torch.dtype, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x1, x2 = (torch.randn(3, k, generator=generator).to(dtype) for _ in range(2))
    return x1, x2, (torch.rand(k, generator=generator) + 0.5).to(dtype)


def exact_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """The formula in float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gamma.double()


def float32_error(k: int) -> float:
    """Relative: half of a sum of k squares' error, its root, and the products."""
    return (k / 2 + 6) * 2**-24


@given(k=st.integers(1, 300), dtype=st.sampled_from(list(EPSILON)), seed=SEEDS)
def test_rms_norm_rounds_once(k: int, dtype: torch.dtype, seed: int) -> None:
    x, _, gamma = tensors(dtype, k, seed)
    y, rstd = npu_rms_norm(x, gamma, EPS)
    exact = exact_norm(x, gamma)
    bound = half_unit(exact, dtype) + exact.abs() * float32_error(k) * (1 + EPSILON[dtype])
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= bound).all()
    exact_rstd = (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert rstd.shape == (3, 1) and rstd.dtype == torch.float32
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=float32_error(k), atol=0)


def test_a_float32_gamma_and_several_dimensions() -> None:
    x, gamma = torch.randn(2, 3, 4, 8).to(torch.float16), torch.rand(4, 8)
    y, rstd = npu_rms_norm(x, gamma)
    assert y.dtype == torch.float16 and rstd.shape == (2, 3, 1, 1)
    flat, _ = npu_rms_norm(x.view(6, 32), gamma.view(32))
    assert torch.equal(flat.view(x.shape), y)


def test_rms_norm_does_not_round_before_gamma() -> None:
    """1 / 3 * 3 in bfloat16 is 1 only if 1 / 3 is not rounded: rounded, it gives 1.0039."""
    x = torch.tensor([[1.0, 5.0, 1.0, 3.0]], dtype=torch.bfloat16)  # mean square 9
    gamma = torch.full((4,), 3.0, dtype=torch.bfloat16)
    once, _ = npu_rms_norm(x, gamma, 0.0)
    assert once[0, 0].item() == 1.0
    twice, _, _ = npu_add_rms_norm(x, torch.zeros_like(x), gamma, 0.0)
    assert twice[0, 0].item() == (x[0, 0] / 3).mul(3).item()


@given(k=st.integers(1, 300), dtype=HALVES, seed=SEEDS)
def test_add_rms_norm_is_an_add_and_a_llama_norm(k: int, dtype: torch.dtype, seed: int) -> None:
    x1, x2, gamma = tensors(dtype, k, seed)
    y, rstd, total = npu_add_rms_norm(x1, x2, gamma, EPS)
    assert torch.equal(total, x1 + x2)
    wide = (x1 + x2).to(torch.float32)
    expected_rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    assert torch.equal(rstd, expected_rstd)
    assert torch.equal(y, gamma * (wide * expected_rstd).to(dtype))


def test_the_sum_is_rounded_before_the_norm() -> None:
    x1 = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    x2 = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    one = torch.ones(2, dtype=torch.bfloat16)
    _, rstd, total = npu_add_rms_norm(x1, x2, one, 0.0)
    assert total.tolist() == [[256.0, 1.0]]
    assert rstd.item() == torch.tensor([(256.0**2 + 1) / 2]).rsqrt().item()


def near(codes: Tensor, exact: Tensor, slack: float) -> None:
    """Each code is the rounded exact value, or its neighbour where that is next to a half."""
    assert ((codes.double() - exact).abs() <= 0.5 + slack).all()


@given(k=st.integers(1, 200), with_beta=st.booleans(), div_mode=st.booleans(), seed=SEEDS)
def test_bfloat16_codes_of_the_norm(k: int, with_beta: bool, div_mode: bool, seed: int) -> None:
    x1, x2, gamma = tensors(torch.bfloat16, k, seed)
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(k, generator=generator) / 8 + 0.03).to(torch.bfloat16)
    scales = scales if div_mode else (1 / scales)
    zero_points = torch.randint(-9, 9, (k,), generator=generator).to(torch.bfloat16)
    beta = torch.randn(k, generator=generator).to(torch.bfloat16) if with_beta else None
    y1, y2, total = npu_add_rms_norm_quant(
        x1, x2, gamma, scales, zero_points, beta, epsilon=EPS, div_mode=div_mode
    )
    assert torch.equal(total, x1 + x2)
    assert y2.shape == y1.shape and not y2.any()
    # Only beta rounds the sum before the norm.
    y = exact_norm(total if with_beta else x1.double() + x2.double(), gamma)
    y = y + (beta.double() if beta is not None else 0)
    exact = y / scales.double() if div_mode else y * scales.double()
    exact = (exact + zero_points.double()).clamp(-128, 127)
    near(y1, exact, 500 * (k + 12) * 2**-24)


def test_float16_codes_come_of_the_rounded_norm_and_both_quantizers_work() -> None:
    x1, x2, gamma = tensors(torch.float16, 64, 0)
    scales = torch.full((64,), 0.02)
    zero_points = torch.full((64,), 3, dtype=torch.int32)
    y1, y2, total = npu_add_rms_norm_quant(
        x1, x2, gamma, scales, zero_points, None, 2 * scales, None, epsilon=EPS
    )
    y, _, expected_total = npu_add_rms_norm(x1, x2, gamma, EPS)
    assert torch.equal(total, expected_total)
    expected = (y.float() / scales).add(3).round().clamp(-128, 127)
    assert torch.equal(y1, expected.to(torch.int8))
    assert torch.equal(y2, (y.float() / (2 * scales)).round().clamp(-128, 127).to(torch.int8))


@given(k=st.integers(1, 40), dtype=HALVES, with_beta=st.booleans(), seed=SEEDS)
def test_dynamic_codes_of_the_norm(k: int, dtype: torch.dtype, with_beta: bool, seed: int) -> None:
    x1, x2, gamma = tensors(dtype, 8 * k, seed)
    beta = gamma if with_beta else None
    y1, y2, total, scale1, scale2 = npu_add_rms_norm_dynamic_quant(
        x1, x2, gamma, beta=beta, epsilon=EPS
    )
    assert y2.shape == scale2.shape == (0,)
    assert torch.equal(total, x1 + x2)
    y = exact_norm(x1.double() + x2.double(), gamma) + (gamma.double() if with_beta else 0)
    exact_scale = y.abs().amax(-1) / 127
    torch.testing.assert_close(scale1.double(), exact_scale, rtol=1e-4, atol=0)
    near(y1, y / exact_scale[:, None], 127 * 1e-4)


@pytest.mark.parametrize("mask", [None, [True, True], [False, True], [True, False]])
def test_output_mask_and_smooth_scales(mask: list[bool] | None) -> None:
    x1, x2, gamma = tensors(torch.bfloat16, 16, 1)
    smooth = [torch.full((16,), 2.0).bfloat16(), torch.linspace(1, 2, 16).bfloat16()]
    asked = mask or [True, True]
    y1, y2, _, scale1, scale2 = npu_add_rms_norm_dynamic_quant(
        x1,
        x2,
        gamma,
        smooth_scale1=smooth[0] if asked[0] else None,
        smooth_scale2=smooth[1] if asked[1] else None,
        output_mask=mask,
        y_dtype=dtype_number(torch.quint4x2),
    )
    y = exact_norm(x1.double() + x2.double(), gamma)
    for wanted, codes, scale, factor in zip(asked, (y1, y2), (scale1, scale2), smooth, strict=True):
        if not wanted:
            assert codes.shape == scale.shape == (0,)
            continue
        values = y * factor.double()
        exact_scale = values.abs().amax(-1) / 7
        torch.testing.assert_close(scale.double(), exact_scale, rtol=1e-4, atol=0)
        near(unpack_words(codes), values / exact_scale[:, None], 7 * 1e-4)
