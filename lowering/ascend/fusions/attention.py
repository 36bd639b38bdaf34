"""Rotary embedding and attention as the vendor's fused ops."""

from __future__ import annotations

import operator

import torch
from torch import fx

from panguq.ir.call_arguments import arguments, operand, operands_at
from panguq.ir.canonical_views import Attention, Rotary
from panguq.ir.edit import call, get_tensor, label
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.lowering.ascend.fusions.masks import hidden_mask
from panguq.lowering.ascend.fusions.shared import FusionState, refusal

aten = torch.ops.aten
npu = torch.ops.npu


def fuse_rotary(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`npu_rotary_mul(x, cos, sin, "half")` on x `[batch, seq, heads, d]`, or why not.

    Heads behind the sequence, with tables `[batch, seq, 1, d]`: with heads in front the op takes no
    more than 8 heads, all sequences together, for each position, and a decoding step has one
    position (aclnnRotaryPositionEmbedding). The mode that turns neighbours is not used: torchair
    2.13.0 drops it from a graph for an Atlas A2, which would then turn halves.
    """
    given = Rotary.of(node)
    if given.interleaved:
        return "torchair drops the mode of npu_rotary_mul that turns neighbours"
    x, tables = given.x, [_of_dtype(t, given.x, state) for t in given.tables]
    for table in tables:
        if not _within_one(table):
            return f"{label(table)} may leave [-1, 1], the range that npu_rotary_mul documents"
    if _swaps_heads(x):
        tokens_first = operand(x, 0)
    else:
        tokens_first = state.call_once(node, aten.transpose.int, (x, 1, 2), suffix=".tokens_first")
    for_heads = [
        state.call_once(node, aten.unsqueeze.default, (t, 2), suffix=".for_heads") for t in tables
    ]
    args = (tokens_first, *for_heads, "half")
    reason = refusal(npu.npu_rotary_mul.default, args)
    if reason is not None:
        return reason
    rotated = call(node, npu.npu_rotary_mul.default, args, origin=node, suffix=".fused")
    return call(node, aten.transpose.int, (rotated, 1, 2), origin=node)


def _of_dtype(table: fx.Node, x: fx.Node, state: FusionState) -> fx.Node:
    dtype = x.meta["val"].dtype
    if table.meta["val"].dtype == dtype:
        return table
    return state.call_once(min(table.users), aten.to.dtype, (table, dtype), suffix=".wide")


def _swaps_heads(x: fx.Node) -> bool:
    """Whether x is `transpose(y, 1, 2)`."""
    if x.target is not aten.transpose.int:
        return False
    given = arguments(x)
    return {given["dim0"] % 4, given["dim1"] % 4} == {1, 2}


_MOVES = (
    aten._to_copy.default, aten.cat.default, aten.embedding.default, aten.expand.default,
    aten.index.Tensor, aten.index_select.default, aten.repeat_interleave.self_int,
    aten.reshape.default, aten.select.int,
    aten.slice.Tensor, aten.squeeze.dim, aten.to.device, aten.to.dtype, aten.transpose.int,
    aten.unsqueeze.default, aten.repeat.default,
)  # fmt: skip


def _within_one(table: fx.Node) -> bool:
    """Whether every value of the table lies in [-1, 1]: cosines or sines that were only moved."""
    if table.op == "get_attr":
        gm = table.graph.owning_module
        assert gm is not None
        return bool(get_tensor(gm, str(table.target)).abs().max() <= 1)
    if table.target in (aten.cos.default, aten.sin.default):
        return True
    if table.target not in _MOVES:
        return False
    return all(_within_one(part) for part in operands_at(table, 0))


def fuse_attention(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`npu_fused_infer_attention_score` in layout BNSD with its mask in full, or why not."""
    given = Attention.of(node)
    query, key, value = given.query, given.key, given.value
    heads, kv_heads = query.meta["val"].shape[1], key.meta["val"].shape[1]
    if isinstance(heads, torch.SymInt) or isinstance(kv_heads, torch.SymInt):
        return "the number of heads is not fixed"
    if given.sinks is not None or given.softcap:
        return "npu_fused_infer_attention_score has no sinks and no cap of its scores"
    hidden = hidden_mask(node, state)
    if isinstance(hidden, str):
        return hidden
    kwargs = {
        "atten_mask": hidden,
        "num_heads": heads,
        "scale": given.scale,
        "input_layout": "BNSD",
        "num_key_value_heads": kv_heads,
    }
    op = npu.npu_fused_infer_attention_score.default
    args = tuple(_contiguous(n, state) for n in (query, key, value))
    reason = refusal(op, args, kwargs)
    if reason is not None:
        return reason
    pair = call(node, op, args, kwargs, origin=node, suffix=".fused")
    return call(node, operator.getitem, (pair, 0), origin=node)


def _contiguous(node: fx.Node, state: FusionState) -> fx.Node:
    """The value, contiguous, as the op demands; a concatenation, such as a grown cache, is so."""
    if node.target in (aten.cat.default, aten.contiguous.default):
        return node
    first_reader = min(node.users)
    return state.call_once(first_reader, aten.contiguous.default, (node,), suffix=".contiguous")
