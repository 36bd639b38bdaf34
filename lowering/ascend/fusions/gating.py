"""The router's choice in one op of the vendor: npu_moe_gating_top_k_softmax, npu_moe_gating_top_k.

What must hold is read from the data flow, from the ids of the chosen experts backwards: the k
largest of scores, of scores plus a bias, or of those within the best groups.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from panguq.ir.call_arguments import arguments, operand
from panguq.ir.edit import call, erase_unused, op_name, replace
from panguq.ir.views import Item
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.kernels.ascend.vendor.moe_gating import LARGEST, SIGMOID, SOFTMAX, TWO_LARGEST
from panguq.lowering.ascend.fusions.shared import refusal

aten = torch.ops.aten
npu = torch.ops.npu

_SHAPED = (aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.clone.default)
_CASTS = (aten.to.dtype, aten._to_copy.default)


class NotExpressible(Exception):
    """Why a choice is none that the op makes."""


@dataclass(frozen=True)
class RouterChoice:
    """The k largest of float32 scores of `logits`, perhaps plus a bias and within groups."""

    scores: fx.Node
    logits: fx.Node
    how: dict[str, Any] = field(default_factory=dict)  # of npu_moe_gating_top_k
    plain: bool = True  # neither bias nor groups
    hidden_as_zero: bool = False


def lower_gating(chosen: fx.Node) -> fx.Node | str:
    """The vendor's op in the place of what leads to the chosen experts, or why not.

    `chosen` are the experts' ids `[t, k]`. A plain softmax becomes npu_moe_gating_top_k_softmax,
    which gives its k largest; anything else npu_moe_gating_top_k, if float32 scores are a softmax,
    or a sigmoid whose weights are divided by their sum, as the op always does.
    """
    item = Item.match(chosen)
    if item is None or item.index != 1 or item.source.target is not aten.topk.default:
        return "the experts are not the second result of a topk"
    topk = item.source
    given = arguments(topk)
    if not _is_last(topk, given["dim"]) or not given["largest"]:
        return "the experts are not those of the largest scores"
    try:
        choice = _choice(operand(topk, 0))
        if choice.plain and choice.how["norm_type"] == SOFTMAX:
            return _softmax(chosen, topk, choice)
        return _general(chosen, topk, choice)
    except NotExpressible as reason:
        return str(reason)


# --- what is chosen of ----------------------------------------------------------------------------


def _choice(ranked: fx.Node) -> RouterChoice:
    groups: dict[str, Any] = {}
    candidates = ranked
    if ranked.target is aten.masked_fill.Scalar:
        candidates = operand(ranked, 0)
        groups = _groups(operand(ranked, 1), candidates)
    scores, bias = candidates, None
    if candidates.target is aten.add.Tensor and arguments(candidates)["alpha"] == 1:
        one, other = arguments(candidates)["self"], arguments(candidates)["other"]
        if isinstance(other, fx.Node):
            scores, added = (one, other) if _kind(one) is not None else (other, one)
            bias = _row(added)
    kind = _kind(scores)
    if kind is None:
        raise NotExpressible(
            f"the scores are neither softmax nor sigmoid of the experts, but {op_name(scores)}"
        )
    if scores.meta["val"].dtype != torch.float32:
        raise NotExpressible(
            "the scores are rounded to 16 bits before the choice, which the op does not do"
        )
    hidden = arguments(ranked)["value"] if groups else -torch.inf
    if hidden != -torch.inf and (hidden != 0 or bias is not None):
        raise NotExpressible(
            f"experts outside the best groups count as {hidden}, which may be chosen where the"
            " op's -inf is not"
        )
    how = {"norm_type": kind, **groups}
    if bias is not None:
        how["bias"] = bias
    plain = bias is None and not groups
    return RouterChoice(scores, operand(scores, 0), how, plain, hidden == 0)


def _kind(scores: fx.Node) -> int | None:
    if scores.target is aten.sigmoid.default:
        return SIGMOID
    if scores.target is aten.softmax.int and _is_last(scores, arguments(scores)["dim"]):
        return SOFTMAX
    return None


def _is_last(node: fx.Node, dim: int) -> bool:
    return dim in (-1, operand(node, 0).meta["val"].dim() - 1)


def _row(bias: fx.Node) -> fx.Node:
    """The stored `[experts]` behind a bias that is added to every token's scores."""
    while bias.target in _SHAPED or (bias.target in _CASTS and _widens(bias)):
        bias = operand(bias, 0)
    if bias.op != "get_attr" or bias.meta["val"].dim() != 1:
        raise NotExpressible("what is added to the scores is not one stored number an expert")
    return bias


def _widens(cast: fx.Node) -> bool:
    before, after = operand(cast, 0).meta["val"], cast.meta["val"]
    return bool(before.is_floating_point() and after.dtype == torch.float32)


def _through(node: fx.Node, *targets: OpOverload) -> fx.Node:
    while node.target in targets:
        node = operand(node, 0)
    return node


def _groups(hidden: fx.Node, candidates: fx.Node) -> dict[str, Any]:
    """`group_count`, `k_group` and the mode, of the mask that hides all but the best groups."""
    other = NotExpressible("the experts that are left out are not those of all but the best groups")
    if hidden.target not in (aten.bitwise_not.default, aten.logical_not.default):
        raise other
    mask = operand(hidden, 0)
    if mask.target in _CASTS:
        mask = operand(mask, 0)
    spread = _through(mask, aten.reshape.default, aten.view.default, aten.clone.default)
    if spread.target is not aten.expand.default:
        raise other
    column = operand(spread, 0)
    groups, members = spread.meta["val"].shape[-2:]
    if column.target is not aten.unsqueeze.default or column.meta["val"].shape[-1] != 1:
        raise other
    kept = operand(column, 0)
    if kept.target is not aten.scatter.value or arguments(kept)["value"] != 1:
        raise other
    if operand(kept, 0).target is not aten.zeros_like.default or arguments(kept)["dim"] not in (
        -1,
        kept.meta["val"].dim() - 1,
    ):
        raise other
    best = Item.match(arguments(kept)["index"])
    if best is None or best.index != 1 or best.source.target is not aten.topk.default:
        raise other
    if not arguments(best.source)["largest"] or not _is_last(
        best.source, arguments(best.source)["dim"]
    ):
        raise other
    mode, grouped = _worth(operand(best.source, 0))
    apart = _through(grouped, aten.reshape.default, aten.view.default)
    sizes = grouped.meta["val"].shape[-2:]
    if apart is not candidates or tuple(sizes) != (groups, members):
        raise NotExpressible("the groups are not scored by what the experts are chosen by")
    how = {"group_count": int(groups), "k_group": int(arguments(best.source)["k"])}
    return {**how, "group_select_mode": mode}


def _worth(worth: fx.Node) -> tuple[int, fx.Node]:
    """What a group is worth: its largest score, or the sum of its two largest; and the scores."""
    given = arguments(worth) if isinstance(worth.target, OpOverload) else {}
    if worth.target is aten.sum.dim_IntList:
        best = Item.match(operand(worth, 0))
        if best is not None and best.index == 0 and best.source.target is aten.topk.default:
            two = arguments(best.source)
            last = operand(best.source, 0).meta["val"].dim() - 1
            if (
                two["k"] == 2
                and two["largest"]
                and two["dim"] in (-1, last)
                and (list(given["dim"]) in ([-1], [last]) and not given["keepdim"])
            ):
                return TWO_LARGEST, operand(best.source, 0)
    if worth.target is aten.amax.default and list(given["dim"]) in (
        [-1],
        [operand(worth, 0).meta["val"].dim() - 1],
    ):
        return LARGEST, operand(worth, 0)
    item = Item.match(worth)
    if (
        item is not None
        and item.index == 0
        and item.source.target is aten.max.dim
        and _is_last(item.source, arguments(item.source)["dim"])
    ):
        return LARGEST, operand(item.source, 0)
    raise NotExpressible(
        "a group is worth neither its largest score nor the sum of its two largest"
    )


# --- the ops --------------------------------------------------------------------------------------


def _softmax(chosen: fx.Node, topk: fx.Node, choice: RouterChoice) -> fx.Node | str:
    op, k = npu.npu_moe_gating_top_k_softmax.default, arguments(topk)["k"]
    logits = _wide(topk, choice.logits, choice.scores)
    args = (logits, None, k)
    if reason := refusal(op, args):
        if logits is not choice.logits:
            erase_unused([logits])
        return reason
    gating = call(topk, op, args, origin=topk, suffix=".gating")
    _take_experts(chosen, topk, gating)
    for value in _values(topk):
        replace(value, _item(topk, gating, 0))
    erase_unused([*topk.users, topk])
    return gating


def _general(chosen: fx.Node, topk: fx.Node, choice: RouterChoice) -> fx.Node | str:
    """The op also makes the weights: scores of the chosen experts, without the bias."""
    op, how = npu.npu_moe_gating_top_k.default, dict(choice.how)
    weights = _weights(chosen, topk, choice)
    if how["norm_type"] == SIGMOID:
        weights = [_normalized(weights, how)]
    before = topk
    logits = _wide(before, choice.logits, choice.scores)
    bias = how.get("bias")
    if bias is not None and bias.meta["val"].dtype != logits.meta["val"].dtype:
        how["bias"] = _wide(before, bias, topk)
    args = (logits, arguments(topk)["k"])
    if reason := refusal(op, args, how):
        erase_unused([n for n in (how.get("bias"), logits) if n not in (bias, choice.logits, None)])
        return reason
    gating = call(before, op, args, how, origin=topk, suffix=".gating")
    for weight in weights:
        replace(weight, _item(topk, gating, 0, ".weights"))
    _take_experts(chosen, topk, gating)
    erase_unused([*topk.users, topk])
    return gating


def _weights(chosen: fx.Node, topk: fx.Node, choice: RouterChoice) -> list[fx.Node]:
    """What holds the scores of the chosen experts: gathered by their ids, or topk's values."""
    values = _values(topk)
    gathers = [
        reader
        for reader in chosen.users
        if reader.target is aten.gather.default
        and operand(reader, 0) is choice.scores
        and _is_last(reader, arguments(reader)["dim"])
    ]
    if values and "bias" in choice.how:
        raise NotExpressible("the weights hold the bias, which the op leaves out of them")
    if gathers and choice.hidden_as_zero:
        # An expert outside the groups can only be chosen as 0, which topk's values say of it.
        raise NotExpressible("experts outside the best groups count as 0, and keep their scores")
    return [*values, *gathers]


def _normalized(weights: list[fx.Node], how: dict[str, Any]) -> fx.Node:
    """`w / (sum(w) + eps)`, and the number that it is multiplied with, which go into `how`."""
    missing = NotExpressible(
        "weights of sigmoid scores are not divided by their sum, which the op always does"
    )
    if len(weights) != 1:
        raise missing
    (weight,) = weights
    quotients = [n for n in weight.users if n.target is aten.div.Tensor]
    if len(quotients) != 1 or operand(quotients[0], 0) is not weight:
        raise missing
    (quotient,) = quotients
    divisor, eps = operand(quotient, 1), 0.0
    if divisor.target in (aten.add.Tensor, aten.add.Scalar):
        given = arguments(divisor)
        if not isinstance(given["other"], int | float) or given["alpha"] != 1:
            raise missing
        divisor, eps = operand(divisor, 0), float(given["other"])
    given = arguments(divisor) if divisor.target is aten.sum.dim_IntList else {}
    last = weight.meta["val"].dim() - 1
    if not given or given["self"] is not weight or not given["keepdim"]:
        raise missing
    if list(given["dim"]) not in ([-1], [last]) or set(weight.users) != {quotient, divisor}:
        raise missing
    how["eps"] = eps
    (*others,) = quotient.users
    if len(others) == 1 and others[0].target in (aten.mul.Tensor, aten.mul.Scalar):
        factor = arguments(others[0])["other"]
        if isinstance(factor, int | float) and operand(others[0], 0) is quotient:
            how["routed_scaling_factor"] = float(factor)
            return others[0]
    return quotient


def _values(topk: fx.Node) -> list[fx.Node]:
    items = [item for item in map(Item.match, topk.users) if item is not None]
    return [item.node for item in items if item.index == 0 and item.node.users]


def _take_experts(chosen: fx.Node, topk: fx.Node, gating: fx.Node) -> None:
    """Let what reads the ids read the op's: int32, widened where something reads them as int64."""
    experts = _item(topk, gating, 1, ".experts")
    for reader in list(chosen.users):
        if reader.target is aten.to.dtype and reader.meta["val"].dtype == torch.int32:
            replace(reader, experts)
    if chosen.users:
        wide = call(topk, aten.to.dtype, (experts, torch.int64), origin=topk, suffix=".ids")
        replace(chosen, wide)


def _wide(before: fx.Node, node: fx.Node, origin: fx.Node) -> fx.Node:
    if node.meta["val"].dtype == torch.float32:
        return node
    args = (node, torch.float32)
    return call(before, aten.to.dtype, args, origin=origin, suffix=".wide")


def _item(node: fx.Node, source: fx.Node, index: int, suffix: str = "") -> fx.Node:
    return call(node, operator.getitem, (source, index), origin=node, suffix=suffix)
