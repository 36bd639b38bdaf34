"""A mixture of experts in the vendor's ops: routing, grouped matmuls, and the weighted sums."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from panguq.ir.call_arguments import arguments, operand
from panguq.ir.edit import call, erase_unused, label, op_name, replace, value_types
from panguq.ir.ops import experts as expert_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.ir.views import ExpertLinear, Item
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.kernels.ascend.vendor.contracts import check_call
from panguq.kernels.ascend.vendor.grouped_matmul_rules import BY_ROWS, CUMULATIVE
from panguq.kernels.ascend.vendor.moe_combine import ROWS
from panguq.lowering.ascend.formats import formats_of
from panguq.lowering.ascend.fusions.gating import lower_gating
from panguq.lowering.ascend.fusions.shared import refusal
from panguq.passes.pipeline.base import PassResult

aten = torch.ops.aten
npu = torch.ops.npu
panguq = torch.ops.panguq


def lower_experts(gm: fx.GraphModule, result: PassResult) -> Counter[str]:
    """Write every mixture of experts of the graph in the vendor's ops; how often each was written.

    The choice of experts becomes one op where it is one that the vendor's make
    (`fusions/gating.py`); others stay aten ops and are named in `result`.

    `permute_tokens(x, route_tokens(ids))` becomes `npu_moe_init_routing_v2(x, ids)`, whose second
    result is the inverse of the canonical order and whose third holds where each expert's rows end:
    of the ways to list them the one that no number of experts leads to another kernel.
    `expert_linear` becomes `npu_grouped_matmul`, `combine_experts` becomes
    `npu_moe_finalize_routing`, or `npu_moe_token_unpermute` where the other does not take the
    dtypes or, in float16, would add up in float16. There are no other kernels, so that a call
    which a contract excludes is a LoweringError that names the module and the rule.
    """
    counts: Counter[str] = Counter()
    for route in [n for n in gm.graph.nodes if n.target is panguq.route_tokens.default]:
        chosen = operand(route, 0)
        _route(route, counts)
        gating = lower_gating(chosen)
        if isinstance(gating, str):
            result.skip(chosen, gating)
        else:
            counts[f"topk -> {op_name(gating)}"] += 1
    return counts


def _route(route: fx.Node, counts: Counter[str]) -> None:
    items = {item.index: item.node for item in map(Item.match, route.users) if item is not None}
    order, rows_of = items.get(0), items.get(1)
    readers = [] if order is None else list(order.users)
    permutes = [n for n in readers if n.target is panguq.permute_tokens.default]
    places = ends = None
    for permute in permutes:
        routed = _init_routing(route, permute)
        places, ends = _item(permute, routed, 1, ".places"), _item(permute, routed, 2, ".ends")
        counts["permute_tokens -> npu_moe_init_routing_v2"] += 1
        if _is_quantized(permute):
            _read_codes(permute, routed)
        else:
            replace(permute, _item(permute, routed, 0))
    if rows_of is not None and ends is not None:
        _read_ends(rows_of, ends, counts)
    for combine in [n for n in readers if n.target is panguq.combine_experts.default]:
        if places is not None:
            combined = _combine(combine, places)
            counts[f"combine_experts -> {op_name(combined)}"] += 1
            replace(combine, combined)
    if order is not None and order.users and places is not None:
        # What else reads the order, as a model that weighs tokens before their experts.
        before = _first_reader(order)
        replace(order, call(before, aten.argsort.default, (places,), origin=order))
    erase_unused([route, *items.values()])


def _read_ends(rows_of: fx.Node, ends: fx.Node, counts: Counter[str]) -> None:
    """Let what reads the numbers of rows read where each expert's rows end."""
    for reader in list(rows_of.users):
        if ExpertLinear.match(reader) is not None:
            counts["expert_linear -> npu_grouped_matmul"] += 1
            replace(reader, grouped_matmul(reader, ends))
        elif reader.target is aten.cumsum.default:
            replace(reader, ends)
    if rows_of.users:
        before = _first_reader(rows_of)
        shift = aten.constant_pad_nd.default
        starts = call(before, shift, (ends, [1, -1]), origin=rows_of, suffix=".starts")
        replace(rows_of, call(before, aten.sub.Tensor, (ends, starts), origin=rows_of))


def _first_reader(node: fx.Node) -> fx.Node:
    return next(other for other in node.graph.nodes if other in node.users)


def _is_quantized(permute: fx.Node) -> bool:
    """Whether rows are read as 8-bit codes alone: those of their tokens, each made once."""
    (reader, *others) = permute.users
    return not others and reader.target is npu.npu_dynamic_quant.default and not reader.kwargs


def _read_codes(permute: fx.Node, routed: fx.Node) -> None:
    """Let the readers of the rows' codes and scales read those of the op that routed both."""
    (quantizer,) = permute.users
    for item in [found for found in map(Item.match, quantizer.users) if found is not None]:
        result = 0 if item.index == 0 else 3
        replace(item.node, call(permute, operator.getitem, (routed, result), origin=item.node))
    erase_unused([quantizer])


def _init_routing(route: fx.Node, permute: fx.Node) -> fx.Node:
    ids, experts = operand(route, 0), int(arguments(route)["experts"])
    if ids.meta["val"].dtype != torch.int32:
        ids = call(permute, aten.to.dtype, (ids, torch.int32), origin=route, suffix=".int32")
    how: dict[str, Any] = {
        "expert_num": experts,
        "expert_tokens_num_type": CUMULATIVE,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, experts],
    }
    x = operand(permute, 0)
    if _is_quantized(permute):
        pair = call(permute, npu.npu_dynamic_quant.default, (x,), origin=permute, suffix=".quant")
        x = _item(permute, pair, 0, ".codes")
        how["scale"] = _item(permute, pair, 1, ".scale")
    args = (x, ids)
    return checked(permute, npu.npu_moe_init_routing_v2.default, args, how, suffix=".routed")


def grouped_matmul(linear: fx.Node, ends: fx.Node) -> fx.Node:
    """The float matmul of all experts; the weight is read where it lies, as a transposed view."""
    given = ExpertLinear.of(linear)
    dtype = linear.meta["val"].dtype
    weight = call(linear, aten.transpose.int, (given.weight, 1, 2), origin=linear, suffix=".turned")
    named: dict[str, Any] = {"group_list": ends, "group_list_type": CUMULATIVE}
    if given.bias is not None:
        bias = given.bias
        if dtype == torch.bfloat16:
            bias = call(linear, aten.to.dtype, (bias, torch.float32), origin=linear, suffix=".bias")
        named["bias"] = [bias]
    return grouped_call(linear, given.input, weight, named)


def grouped_call(
    linear: fx.Node,
    x: fx.Node,
    weight: fx.Node,
    named: Mapping[str, Any],
    chip: Chip = ATLAS_A2,
) -> fx.Node:
    """`npu_grouped_matmul` of rows `[r, k]` and a weight `[experts, k, n]`: `[r, n]`."""
    how = {**named, "split_item": 2, "group_type": BY_ROWS}
    op = npu.npu_grouped_matmul.default
    return _item(linear, checked(linear, op, ([x], [weight]), how, suffix=".grouped", chip=chip), 0)


def _combine(combine: fx.Node, places: fx.Node) -> fx.Node:
    rows, weights = operand(combine, 0), operand(combine, 2)
    finalize = npu.npu_moe_finalize_routing.default
    args = (rows, None, None, None, weights, places, None, ROWS)
    if rows.meta["val"].dtype != torch.float16 and refusal(finalize, args) is None:
        return call(combine, finalize, args, origin=combine)
    unpermute = npu.npu_moe_token_unpermute.default
    return checked(combine, unpermute, (rows, places, weights), {}, suffix="")


def checked(
    node: fx.Node,
    op: OpOverload,
    args: tuple[Any, ...],
    named: Mapping[str, Any],
    *,
    suffix: str,
    chip: Chip = ATLAS_A2,
) -> fx.Node:
    """A call in front of `node`. Raises LoweringError for one that the op's contract excludes."""
    formats = formats_of(op, args, named)
    check_call(op, value_types(args), value_types(dict(named)), label(node), chip, formats)
    return call(node, op, args, named, origin=node, suffix=suffix)


def _item(node: fx.Node, source: fx.Node, index: int, suffix: str = "") -> fx.Node:
    """One of a call's results, in front of `node`; without a suffix, in `node`'s own name."""
    return call(node, operator.getitem, (source, index), origin=node, suffix=suffix)
