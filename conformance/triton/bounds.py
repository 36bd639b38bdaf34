"""How far a sum in float32 may be from the exact one, and inputs for matmuls.

For any order of n additions of exact products, |computed - exact| <= gamma_n * sum |products| with
gamma_n = n u / (1 - n u), u = 2**-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1
and 4.2). Products of two float16 or two bfloat16 numbers are exact in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.kernels.ascend.own.int4_weight import QUARTERS, codes_of_quarters
from panguq.kernels.ascend.own.w4a16 import BIAS_DTYPE

FLOAT32_ROUNDOFF = 2.0**-24


def w4a16_inputs(
    m: int, n: int, k: int, group_size: int, dtype: torch.dtype, offset: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Random x, weight, scale, offset, bias as the W4A16 ops take them."""
    groups = -(-k // group_size)
    words = torch.randint(-(2**15), 2**15, (k, n // QUARTERS), dtype=torch.int16)
    return (
        torch.randn(m, k).to(dtype),
        words,
        (torch.rand(groups, n) * 0.05 + 0.01).to(dtype),
        torch.randint(-8, 8, (groups, n)).to(dtype) if offset else None,
        torch.randn(n).to(BIAS_DTYPE[dtype]) if bias else None,
    )


def assert_within_bound(
    result: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    additions: int,
) -> None:
    """The result is the float64 one up to `additions` float32 additions and its own rounding."""
    codes, scales = (
        codes_of_quarters(weight).double(),
        _each_row(scale, weight.shape[0], group_size),
    )
    offsets = torch.zeros_like(scales)
    if offset is not None:
        offsets = _each_row(offset, weight.shape[0], group_size)
    tokens = x.to(torch.float64)
    exact = tokens @ ((codes + offsets) * scales)
    # Offsets are added to the sums.
    magnitude = tokens.abs() @ ((codes.abs() + offsets.abs()) * scales.abs())
    if bias is not None:
        exact += bias
        magnitude += bias.abs()
    gamma = additions * FLOAT32_ROUNDOFF / (1 - additions * FLOAT32_ROUNDOFF)
    summed = gamma * magnitude
    details = torch.finfo(result.dtype)
    # Rounding to nearest: half the distance of two neighbours, also where numbers are subnormal.
    rounded = details.eps / 2 * (exact.abs() + summed) + details.tiny * details.eps / 2
    assert bool(((result.to(torch.float64) - exact).abs() <= summed + rounded).all())


def _each_row(values: Tensor, k: int, group_size: int) -> Tensor:
    """One row of [groups, n] for each input, in float64."""
    return values.double().reshape(-1, values.shape[-1]).repeat_interleave(group_size, 0)[:k]
