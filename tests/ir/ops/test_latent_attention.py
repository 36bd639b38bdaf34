"""Latent attention in both of its forms, against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from panguq.ir.ops import canonical
from panguq.ir.ops import latent_attention as module
from panguq.ir.ops.latent_attention import absorbs, latent_attention
from panguq.ir.ops.opset import body_of

SCALE = 0.3
EMPTY = torch.empty(0, dtype=torch.bool)


def operands(
    seq: int,
    total: int,
    heads: int = 2,
    nope: int = 8,
    rope: int = 4,
    value: int = 6,
    rank: int = 16,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seq * 101 + total)
    shapes = (
        (2, heads, seq, nope),
        (2, heads, seq, rope),
        (2, 1, total, rank),
        (2, 1, total, rope),
        (heads * (nope + value), rank),
    )
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


def formula(given: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Head after head: W_uk and W_uv make its keys and values of the latents."""
    query_nope, query_rope, latent, rope_key, weight = given
    heads, nope = query_nope.shape[1], query_nope.shape[3]
    results = []
    for head, rows in enumerate(weight.chunk(heads)):
        keys, values = latent[:, 0] @ rows[:nope].T, latent[:, 0] @ rows[nope:].T
        scores = query_nope[:, head] @ keys.mT + query_rope[:, head] @ rope_key[:, 0].mT
        scores = (scores * SCALE).masked_fill(~mask[:, 0], -torch.inf)
        results.append(scores.softmax(-1) @ values)
    return torch.stack(results, dim=1)


@pytest.fixture(params=[True, False], ids=["absorbed", "expanded"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every call takes this form."""
    monkeypatch.setattr(module, "absorbs", lambda *shapes: request.param)
    return bool(request.param)


@pytest.mark.parametrize("seq, total", [(1, 1), (1, 7), (3, 3), (3, 8)])
def test_the_formula(form: bool, seq: int, total: int) -> None:
    given = operands(seq, total)
    causal = torch.ones(2, 1, seq, total, dtype=torch.bool).tril(total - seq)
    padded = causal.clone()
    padded[1, :, :, : total - seq] = False  # but each token sees itself
    wanted = formula(given, causal)
    for mask, expected in ((causal, wanted), (EMPTY, wanted), (padded, formula(given, padded))):
        result = latent_attention(*given, mask, SCALE)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)
    added = torch.zeros(causal.shape, dtype=torch.float64).masked_fill(~padded, -torch.inf)
    torch.testing.assert_close(latent_attention(*given, added, SCALE), formula(given, padded))
    everything = formula(given, torch.ones_like(causal))
    torch.testing.assert_close(latent_attention(*given, None, SCALE), everything)


SIZES = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(*[SIZES] * 7)
def test_both_forms_are_equal(seq, past, heads, nope, rope, value, rank) -> None:
    given = operands(seq, past + seq, heads, nope, rope, value, rank)
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for absorbed in (True, False):
            patch.setattr(module, "absorbs", lambda *shapes, absorbed=absorbed: absorbed)
            results.append(latent_attention(*given, EMPTY, SCALE))
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)


# DeepSeek-V3: 128 heads, 128 + 64 a key, 128 a value, rank 512.


@pytest.mark.parametrize(
    "seq, total, absorbed",
    [(1, 1, False), (1, 2, True), (1, 4096, True), (64, 4096, True), (4096, 4096, False),
     (512, 1024, False)],
)  # fmt: skip
def test_a_step_absorbs_and_a_prompt_expands(seq: int, total: int, absorbed: bool) -> None:
    with torch.device("meta"):
        shapes = [
            torch.empty(1, 128, seq, 128), torch.empty(1, 128, seq, 64),
            torch.empty(1, 1, total, 512), torch.empty(128 * 256, 512),
        ]  # fmt: skip
    assert absorbs(*shapes) is absorbed


@settings(max_examples=10, deadline=None)
@given(*[st.integers(2, 9)] * 7)  # PyTorch counts no product of a single number
def test_the_form_that_multiplies_less(seq, past, heads, nope, rope, value, rank) -> None:
    """By PyTorch's own count of either form."""
    given = operands(seq, past + seq, heads, nope, rope, value, rank)
    flops = {}
    with pytest.MonkeyPatch.context() as patch:  # bodies, since the counter sees into no op
        patch.setattr(canonical, "attention", body_of(canonical.attention))
        for absorbed in (True, False):
            patch.setattr(module, "absorbs", lambda *shapes, absorbed=absorbed: absorbed)
            with FlopCounterMode(display=False) as counter:
                body_of(latent_attention)(*given, None, SCALE)
            flops[absorbed] = counter.get_total_flops()
    assert 0 < flops[absorbs(*given[:3], given[4])] == min(flops.values())
