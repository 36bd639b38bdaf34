"""Attention with capped scores and sinks, against the formulas spelled out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from panguq.ir.ops import canonical  # noqa: F401  (registers torch.ops.panguq.*)

attention = torch.ops.panguq.attention.default


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


QUERY, KEY, VALUE = (
    normal(2, 4, 3, 8, seed=0),
    normal(2, 2, 5, 8, seed=1),
    normal(2, 2, 5, 6, seed=2),
)
MASK = torch.ones(2, 1, 3, 5, dtype=torch.bool).tril(2)
MASK[1, :, :, 0] = False
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def expected(cap: float, sinks: Tensor | None) -> Tensor:
    """One score, weight and sum at a time."""
    result = torch.zeros(2, 4, 3, 6, dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(4) for i in range(3)):
        scores = [0.3 * (QUERY[b, h, i].double() @ KEY[b, h // 2, j].double()) for j in range(5)]
        scores = [cap * math.tanh(s / cap) if cap else s for s in scores]
        weights = [math.exp(s) if MASK[b, 0, i, j] else 0.0 for j, s in enumerate(scores)]
        total = sum(weights) + (math.exp(sinks[h]) if sinks is not None else 0.0)
        for j in range(5):
            result[b, h, i] += weights[j] / total * VALUE[b, h // 2, j].double()
    return result


@pytest.mark.parametrize("cap", [0.0, 0.7])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_the_formula(cap, sinks) -> None:
    result = attention(QUERY, KEY, VALUE, MASK, 0.3, sinks, cap)
    torch.testing.assert_close(result.double(), expected(cap, sinks), atol=1e-6, rtol=1e-5)
    for changed in (0.0 if cap else 0.7, cap):
        other = attention(QUERY, KEY, VALUE, MASK, 0.3, SINKS - 1, changed)
        assert (other - result).abs().max() > 1e-3


@pytest.mark.parametrize("more", [(), (SINKS, 0.0), (None, 0.7), (SINKS, 0.7)])
def test_masks_of_either_kind_and_none_mean_one_thing(more) -> None:
    causal = torch.ones(3, 5, dtype=torch.bool).tril(2)
    added = torch.zeros(3, 5).masked_fill(~causal, -math.inf)
    results = [
        attention(QUERY, KEY, VALUE, mask, 0.3, *more)
        for mask in (causal, added, torch.empty(0, dtype=torch.bool))
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("more", [(), (SINKS, 0.0), (None, 0.7)])
def test_without_a_mask_nothing_is_hidden(more) -> None:
    result = attention(QUERY, KEY, VALUE, None, 0.3, *more)
    everything = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(result, attention(QUERY, KEY, VALUE, everything, 0.3, *more))
    fake = attention(*(x.to("meta") for x in (QUERY, KEY, VALUE)), None, 0.3)
    assert (result.shape, result.stride()) == (fake.shape, fake.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fake_has_the_result_s_form(dtype) -> None:
    args = [x.to(dtype) for x in (QUERY, KEY, VALUE)]
    real = attention(*args, MASK, 0.3, SINKS.to(dtype), 0.7)
    fake = attention(*(x.to("meta") for x in args), MASK.to("meta"), 0.3, SINKS.to("meta"), 0.7)
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
