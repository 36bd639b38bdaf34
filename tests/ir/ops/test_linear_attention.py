"""The op of recurrences against the recurrence itself, token after token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from panguq.ir.ops.linear_attention import CHUNK, gated_linear_attention
from panguq.ir.ops.opset import body_of

BATCH, KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 2, 4, 8, 6


def inputs(tokens: int, delta: bool, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    key = normal(BATCH, tokens, KEY_HEADS, KEY_DIM)
    given = [
        normal(BATCH, tokens, KEY_HEADS, KEY_DIM),
        key / key.norm(dim=-1, keepdim=True),
        normal(BATCH, tokens, HEADS, VALUE_DIM),
        -normal(BATCH, tokens, HEADS).exp(),
        normal(BATCH, tokens, HEADS).sigmoid() if delta else None,
        normal(BATCH, HEADS, KEY_DIM, VALUE_DIM),
    ]
    return [None if x is None else x.to(dtype) for x in given]


def by_token(query, key, value, decay, beta, state) -> tuple[Tensor, Tensor]:
    """The two formulas of the op's docstring."""
    results = []
    for t in range(value.shape[1]):
        q, k = (x[:, t].repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (query, key))
        state = state * decay[:, t].exp()[..., None, None]
        written = value[:, t]
        if beta is not None:
            written = beta[:, t][..., None] * (written - torch.einsum("bhkv,bhk->bhv", state, k))
        state = state + k[..., :, None] * written[..., None, :]
        results.append(torch.einsum("bhkv,bhk->bhv", state, q))
    return torch.stack(results, dim=1), state


@pytest.mark.parametrize("delta", [False, True], ids=["state space", "delta rule"])
@pytest.mark.parametrize("tokens", [1, 5, CHUNK, 2 * CHUNK + 3])
def test_is_the_recurrence(tokens, delta) -> None:
    given = inputs(tokens, delta)
    for wanted, found in zip(by_token(*given), gated_linear_attention(*given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("delta", [False, True], ids=["state space", "delta rule"])
def test_goes_on_where_it_stopped(delta) -> None:
    *sequences, state = inputs(70, delta)
    whole, last = gated_linear_attention(*sequences, state)
    parts = []
    for part in (slice(0, 9), slice(9, 10), slice(10, 70)):
        cut = [None if x is None else x[:, part] for x in sequences]
        result, state = gated_linear_attention(*cut, state)
        parts.append(result)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_keys_that_repeat_do_not_grow() -> None:
    """The worst case of a solver by powers of the system: all keys alike, all of them rewritten."""
    query, key, value, _, beta, state = inputs(CHUNK, True, torch.float32)
    key = key[:, :1].expand_as(key)
    given = [query, key, value, torch.zeros_like(beta), torch.full_like(beta, 0.999), state]
    wanted, _ = by_token(*(x.double() for x in given))
    found, _ = gated_linear_attention(*given)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)


def test_results_have_the_dtypes_of_value_and_state() -> None:
    given = inputs(5, True, torch.bfloat16)
    given[-1] = given[-1].float()
    result, state = gated_linear_attention(*given)
    assert (result.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.library.opcheck(gated_linear_attention, tuple(given), test_utils=["test_faketensor"])


def test_gradients_reach_every_input() -> None:
    given = [x.requires_grad_() for x in inputs(3, True)]
    assert torch.autograd.gradcheck(body_of(gated_linear_attention), tuple(given))
