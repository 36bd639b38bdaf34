"""Recurrences of transformers' models, which loop over tokens, as calls of one op in a trace.

Such a model has two forms of its recurrence, one for prompts and one for a single token; a graph
has the prompt's, which serves any number of tokens.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from panguq.ir.ops import linear_attention  # noqa: F401  (registers torch.ops.panguq.*)

NORM_EPSILON = 1e-6  # that of every model with normalized queries and keys


@contextmanager
def recurrences_as_ops(model: nn.Module) -> Iterator[None]:
    """Within, the functions that these modules' source files call are panguq's."""
    names = {type(module).__module__ for module in model.modules()}
    files = [sys.modules[name] for name in names if name in sys.modules]
    found = [
        (file, name, own)
        for file in files
        for name, own in _OWN.items()
        if inspect.isfunction(getattr(file, name, None))
    ]
    originals = [(file, name, getattr(file, name)) for file, name, _ in found]
    for file, name, own in found:
        setattr(file, name, own)
    try:
        yield
    finally:
        for file, name, original in originals:
            setattr(file, name, original)


def _gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Qwen3-Next's: query and key `[batch, seq, key_heads, d]`, as the op takes them."""
    query, key = query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        query, key = (x * ((x * x).sum(-1, True) + NORM_EPSILON).rsqrt() for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    if initial_state is None:
        shape = (value.shape[0], *value.shape[2:3], key.shape[-1], value.shape[-1])
        initial_state = torch.zeros(shape, device=value.device)
    attend = torch.ops.panguq.gated_linear_attention.default
    result, state = attend(query, key, value, g, beta, initial_state)
    return result, state


def _state_space(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **unused: Any,
) -> Any:
    """Mamba-2's: hidden_states `[batch, seq, heads, d]`, dt `[batch, seq, heads]`, B and C
    `[batch, seq, groups, n]`, states `[batch, heads, d, n]`."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    step = (functional.softplus(dt) if dt_softplus else dt).float()
    wide = hidden_states.float()
    if initial_states is None:
        shape = (*wide.shape[:1], *wide.shape[2:], B.shape[-1])
        initial_states = torch.zeros(shape, device=wide.device)
    step = _limited(step, *dt_limit, initial_states)
    attend = torch.ops.panguq.gated_linear_attention.default
    start = initial_states.transpose(2, 3)
    result, state = attend(C, B, wide * step[..., None], A.float() * step, None, start)
    if D is not None:
        result = result + D[:, None] * wide
    state = state.transpose(2, 3)
    return (result, state) if return_final_states else result


def _limited(step: Tensor, least: float, largest: float, state: Tensor) -> Tensor:
    """Time steps `[batch, seq, heads]` as transformers limits them: in a prompt, but not in the
    form of its recurrence that serves a single token after a past, whose state is not zero."""
    limited = step if least <= 0 else step.clamp_min(least)
    limited = limited if math.isinf(largest) else limited.clamp_max(largest)
    if limited is step:
        return step
    several = torch.ones(step.shape[1], device=step.device).sum() > 1
    begins = state.abs().amax() == 0
    return torch.where(torch.logical_or(several, begins), limited, step)


_OWN: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "mamba2_chunk_scan": _state_space,
}
