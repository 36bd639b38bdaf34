"""Mixtures of experts: tokens sorted by expert, one matmul of all experts, and the way back.

    order, counts = route_tokens(expert_ids, experts)
    rows = permute_tokens(x, order, top_k)
    rows = expert_linear(rows, weight, bias, counts)     # once or more, ops of the model between
    y = combine_experts(rows, order, routing_weights)

`t` is the number of tokens, `r = t * top_k` that of rows: row `i * top_k + j` is token i as its
j-th expert meets it. Experts that no row goes to are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from panguq.errors import InputError
from panguq.ir.ops.opset import define_op


def _route_tokens_fake(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    rows = expert_ids.shape[0] * expert_ids.shape[1]
    return (
        expert_ids.new_empty(rows, dtype=torch.int64),
        expert_ids.new_empty(experts, dtype=torch.int64),
    )


@define_op(
    "route_tokens(Tensor expert_ids, int experts) -> (Tensor order, Tensor counts)",
    fake=_route_tokens_fake,
)
def route_tokens(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The order that sorts rows by expert, and how many rows each expert has.

    expert_ids integer `[t, top_k]`, 0 <= id < experts. Returns int64 `[r]`: the rows in order,
    those of one expert as they were, and int64 `[experts]`. Raises InputError for an id that is no
    expert.
    """
    ids = expert_ids.reshape(-1).to(torch.int64)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < experts:
        raise InputError(
            f"a token is routed to expert {int(ids.max())} of {experts}",
            "routing weights that are not finite can do this; check the model's weights",
        )
    return ids.argsort(stable=True), torch.bincount(ids, minlength=experts)


def each_experts_rows(
    counts: Tensor, members: Sequence[int] | None = None
) -> Iterator[tuple[int | None, slice]]:
    """Every expert that has rows, by its place in a weight, and these rows.

    counts int64 `[experts]`. The weight is that of all experts, or of `members`; then the others
    have no place in it.
    """
    start = 0
    places = None if members is None else {expert: place for place, expert in enumerate(members)}
    for expert, count in enumerate(counts.tolist()):
        if count:
            place = expert if places is None else places.get(expert)
            yield place, slice(start, start + count)
            start += count


@define_op(
    "permute_tokens(Tensor x, Tensor order, int top_k) -> Tensor",
    fake=lambda x, order: x.new_empty((order.shape[0], x.shape[1])),
)
def permute_tokens(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Every row's token, in the rows' order: `x[order // top_k]`; x `[t, k]`, order `[r]`."""
    return x.index_select(0, order.div(top_k, rounding_mode="floor"))


@define_op(
    "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor counts, int[]? members=None)"
    " -> Tensor",
    fake=lambda x, weight: x.new_empty((x.shape[0], weight.shape[1])),
)
def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    members: Sequence[int] | None = None,
) -> Tensor:
    """`x @ weight[e].T + bias[e]`, the first `counts[0]` rows with expert 0, and so on.

    x `[r, k]`, sorted by expert; weight `[experts, n, k]`; bias `[experts, n]` or None; counts
    int64 `[experts]`, which add up to r. Returns `[r, n]`. Reads the weights of experts that have
    rows, and no others. With `members`, weight and bias are those of these experts alone, in rising
    order, and the rows of all others become zero: results of several groups of experts add up.
    """
    parts = []
    for index, rows in each_experts_rows(counts, members):
        if index is None:
            parts.append(x.new_zeros((rows.stop - rows.start, weight.shape[1])))
        else:
            shift = None if bias is None else bias[index]
            parts.append(functional.linear(x[rows], weight[index], shift))
    return torch.cat(parts) if parts else x.new_empty((0, weight.shape[1]))


@define_op(
    "combine_experts(Tensor rows, Tensor order, Tensor routing_weights) -> Tensor",
    fake=lambda rows, routing_weights: rows.new_empty((routing_weights.shape[0], rows.shape[1])),
)
def combine_experts(rows: Tensor, order: Tensor, routing_weights: Tensor) -> Tensor:
    """Every token's weighted sum of what its experts gave.

    rows `[r, n]` and order `[r]` as sorted by expert; routing_weights float `[t, top_k]`. Returns
    `[t, n]` in the rows' dtype; products and the sum over experts, in the order of `top_k`, are
    float32 (float64 stays float64).
    """
    tokens, top_k = routing_weights.shape
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    placed = torch.empty_like(order)
    placed[order] = torch.arange(len(order), device=order.device)
    each = rows.index_select(0, placed).unflatten(0, (tokens, top_k)).to(wide)
    return torch.einsum("tkn,tk->tn", each, routing_weights.to(wide)).to(rows.dtype)
