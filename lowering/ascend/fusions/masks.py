"""Attention masks of an Ascend graph: in full, and with the sense that the reader wants."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from panguq.ir.canonical_views import Attention, LatentAttention
from panguq.ir.edit import call, label
from panguq.lowering.ascend.fusions.shared import FusionState, size_key

aten = torch.ops.aten


def attended_mask(attention: fx.Node, state: FusionState) -> fx.Node | None:
    """The attention's mask in full: as it is, or built from the sizes where it is empty.

    bool `[1, 1, seq, total]` for an empty one, True where query i may see key j:
    `j <= total - seq + i`.
    """
    _, _, mask = _read(attention)
    if mask is None or not _is_empty(mask):
        return mask
    return _causal(attention, state, hidden=False)


def hidden_mask(attention: fx.Node, state: FusionState) -> fx.Node | str | None:
    """bool `[batch or 1, 1, seq, total]`, True where a key is hidden, or why there cannot be one;
    None where nothing is hidden.

    These shapes are npu_fused_infer_attention_score's, in full (op-plugin docs, `atten_mask`).
    """
    query, key, mask = _read(attention)
    if mask is None:
        return None
    if _is_empty(mask):
        return _causal(attention, state, hidden=True)
    value = mask.meta["val"]
    if value.dtype != torch.bool:
        return f"{label(mask)} is added to the scores, and the op takes a boolean mask"
    wanted = [size_key(query.meta["val"].shape[2]), size_key(key.meta["val"].shape[2])]
    if value.dim() not in (2, 4) or [size_key(s) for s in value.shape[-2:]] != wanted:
        return f"{label(mask)} has shape {list(value.shape)}, not one row a query over all keys"
    if value.dim() == 4 and value.shape[1] != 1:
        return f"{label(mask)} differs from head to head"
    for _ in range(4 - value.dim()):
        mask = state.call_once(attention, aten.unsqueeze.default, (mask, 0), suffix=".unsqueeze")
    return state.call_once(attention, aten.logical_not.default, (mask,), suffix=".hidden")


def _read(attention: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """What has one row a query, what has one a key, and the mask, of attention of either kind."""
    latent = LatentAttention.match(attention)
    if latent is not None:
        return latent.queries[0], latent.latent, latent.mask
    given = Attention.of(attention)
    return given.query, given.key, given.mask


def _is_empty(mask: fx.Node) -> bool:
    """Whether this mask has no element whatever the sizes: canonicalize's plain causal mask."""
    return any(size_key(size) == 0 for size in mask.meta["val"].shape)


def _causal(attention: fx.Node, state: FusionState, hidden: bool) -> fx.Node:
    """The causal mask of this attention's sizes, once for all that have the same."""
    query, key, _ = _read(attention)
    sizes = tuple(size_key(n.meta["val"].shape[2]) for n in (query, key))
    return state.once((*sizes, hidden), lambda: _make_causal(attention, query, key, hidden))


def _make_causal(attention: fx.Node, query: fx.Node, key: fx.Node, hidden: bool) -> fx.Node:
    mask = _read(attention)[2] or attention

    def make(op: Any, args: tuple[Any, ...], suffix: str, kwargs: Any = None) -> fx.Node:
        return call(attention, op, args, kwargs, origin=mask, suffix=suffix)

    seq = make(aten.sym_size.int, (query, 2), ".seq")
    total = make(aten.sym_size.int, (key, 2), ".total")
    past = make(operator.sub, (total, seq), ".past")
    ones = make(aten.new_ones.default, (query, [1, 1, seq, total]), ".ones", {"dtype": torch.bool})
    if not hidden:
        return make(aten.tril.default, (ones, past), ".attended")
    first_hidden = make(operator.add, (past, 1), ".first_hidden")
    return make(aten.triu.default, (ones, first_hidden), ".hidden")
