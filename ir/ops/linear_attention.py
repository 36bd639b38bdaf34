"""Attention that keeps a state instead of keys: the recurrences of hybrid models as one op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from panguq.ir.ops.opset import define_op

CHUNK = 64
"""So many tokens are computed by matmuls at a time; the state passes from one chunk to the next."""


def _fake(query: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), state.new_empty(state.shape)


@define_op(
    "gated_linear_attention(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor? beta, "
    "Tensor state) -> (Tensor, Tensor)",
    fake=_fake,
)
def gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Each token's read of a decaying state, `[batch, seq, heads, d_v]`, and the state at the end.

    query and key `[batch, seq, key_heads, d_k]`, of which each serves `heads / key_heads` heads of
    value `[batch, seq, heads, d_v]`; decay, at most 0, and beta `[batch, seq, heads]`; state
    `[batch, heads, d_k, d_v]`. Token after token

        S = exp(decay) S + outer(k, w),    y = S^T q,

    where `w = v` without beta, which is Mamba-2's state space (Dao and Gu, arXiv 2405.21060), and
    `w = beta (v - exp(decay) S^T k)` with it, the gated delta rule (Yang et al., arXiv 2412.06464).
    The result has value's dtype, the new state the state's; both are computed in float32 or wider.
    """
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    groups = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(groups, dim=2) for x in (query, key))
    query, key, value_, decay = (x.to(wide).transpose(1, 2) for x in (query, key, value, decay))
    rate = None if beta is None else beta.to(wide).transpose(1, 2)
    now, results = state.to(wide), []
    for start in range(0, value_.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        result, now = _chunk(
            query[:, :, part],
            key[:, :, part],
            value_[:, :, part],
            decay[:, :, part],
            None if rate is None else rate[:, :, part],
            now,
        )
        results.append(result)
    whole = torch.cat(results, dim=2).transpose(1, 2)
    return whole.to(value.dtype).contiguous(), now.to(state.dtype).contiguous()


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """All tokens of a chunk at once, `[batch, heads, tokens, d]`, from the state before it.

    With beta, what the tokens write depends on what those before them wrote: a triangular system.
    """
    total = decay.cumsum(-1)
    later = torch.ones(*(decay.shape[-1:] * 2), dtype=torch.bool, device=decay.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -math.inf).exp()
    since_start, to_end = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
    written = value
    if beta is not None:
        known = (key * since_start) @ state
        system = (key @ key.transpose(-1, -2)) * between * beta[..., None]
        written = torch.linalg.solve_triangular(
            system, beta[..., None] * (value - known), upper=False, unitriangular=True
        )
    scores = (query @ key.transpose(-1, -2)) * between
    result = (query * since_start) @ state + scores @ written
    kept = state * since_start[..., -1:, :]
    return result, kept + (key * to_end).transpose(-1, -2) @ written
