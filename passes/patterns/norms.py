"""Norms as models spell them, raised into `panguq.rms_norm`, `aten.layer_norm` and its kin."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from panguq.ir.call_arguments import arguments, operand
from panguq.ir.edit import call
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.passes.patterns.matching import (
    both_orders,
    is_call,
    pair,
    through_casts,
    through_wider_casts,
    type_of,
)

aten = torch.ops.aten
panguq = torch.ops.panguq

NARROW = (torch.bfloat16, torch.float16)


class _Normalized(NamedTuple):
    """What was normalized, and the number under the root."""

    x: fx.Node
    eps: float
    centered: bool  # the mean was subtracted


class _Gain(NamedTuple):
    """`weight + offset`, the weight stored `[k]`; `sum` is the addition, if there is one."""

    weight: fx.Node
    offset: float
    sum: fx.Node | None


def scaled_norm(node: fx.Node) -> fx.Node | None:
    """Anchored at the last product, `gain * normalized`."""
    for gain_node, scaled in both_orders(node):
        found, gain = _normalized(through_casts(scaled)), _gain(gain_node)
        if found is None or gain is None:
            continue
        source = through_casts(found.x)
        widest = torch.promote_types(type_of(source), type_of(gain.weight))
        if not type_of(source) == type_of(scaled) == type_of(node) == widest:
            continue
        if gain.sum is not None and type_of(gain.sum) != type_of(gain.weight):
            continue
        return _raised(node, source, found, gain)
    return None


def rounded_norm(node: fx.Node) -> fx.Node | None:
    """Anchored at a cast to 16 bits: `(gain * normalized).to(dtype)`, all before it in float32."""
    if type_of(node) not in NARROW:
        return None
    product = operand(node, 0)
    if is_call(product, aten.layer_norm.default):
        return _narrow_layer_norm(node, product)
    if not is_call(product, aten.mul.Tensor) or type_of(product) != torch.float32:
        return None
    for gain_node, scaled in both_orders(product):
        found, gain = _normalized(scaled), _gain(gain_node)
        if found is None or gain is None or type_of(scaled) != torch.float32:
            continue
        source = through_wider_casts(found.x)
        if not type_of(source) == type_of(node) == type_of(gain.weight):
            continue
        if gain.sum is not None and type_of(gain.sum) != torch.float32:
            continue
        return _raised(node, source, found, gain, rounds_once=True)
    return None


def _raised(
    node: fx.Node, source: fx.Node, found: _Normalized, gain: _Gain, rounds_once: bool = False
) -> fx.Node | None:
    weight, offset = gain.weight, gain.offset
    if not found.centered:
        given = (source, weight, found.eps)
        args = (*given, offset, rounds_once) if offset or rounds_once else given
        return call(node, panguq.rms_norm.default, args, origin=node)
    if offset or (type_of(source) in NARROW and not rounds_once):
        return None  # aten.layer_norm has no offset, and rounds once
    shape = [int(weight.meta["val"].shape[0])]
    layer_norm = aten.layer_norm.default
    return call(node, layer_norm, (source, shape, weight, None, found.eps), origin=node)


def torch_rms_norm(node: fx.Node) -> fx.Node | None:
    """`torch.nn.functional.rms_norm` with a weight."""
    given = arguments(node)
    weight, eps = given["weight"], given["eps"]
    if weight is None or eps is None or len(given["normalized_shape"]) != 1:
        return None
    return call(node, panguq.rms_norm.default, (given["input"], weight, eps), origin=node)


def offset_layer_norm(node: fx.Node) -> fx.Node | None:
    """A layer norm over the last dim whose weight is `stored + offset`, as in Nemotron."""
    given = arguments(node)
    if given["weight"] is None or len(given["normalized_shape"]) != 1:
        return None
    gain = _gain(given["weight"])
    if gain is None or gain.sum is not given["weight"] or not gain.offset:
        return None
    if type_of(gain.sum) != type_of(gain.weight):
        return None
    args = (given["input"], gain.weight, given["bias"], given["eps"], gain.offset)
    return call(node, panguq.layer_norm.default, args, origin=node)


def _narrow_layer_norm(node: fx.Node, norm: fx.Node) -> fx.Node | None:
    """A layer norm without a weight, in float32 between two casts: the op rounds once itself."""
    given = arguments(norm)
    source = through_wider_casts(given["input"])
    if given["weight"] is not None or given["bias"] is not None or len(norm.users) > 1:
        return None
    if type_of(source) != type_of(node):
        return None
    args = (source, given["normalized_shape"], None, None, given["eps"])
    return call(node, aten.layer_norm.default, args, origin=node)


def _gain(node: Any) -> _Gain | None:
    """The gain that this node is; None if it is none over one dim."""
    node = through_wider_casts(node)
    total, offset = None, 0.0
    if is_call(node, aten.add.Tensor) and not node.kwargs:
        total, (node, offset) = node, pair(node)
        node = through_wider_casts(node)
    stored = isinstance(node, fx.Node) and node.op == "get_attr"
    if not stored or not isinstance(offset, (int, float)) or node.meta["val"].dim() != 1:
        return None
    return _Gain(node, float(offset), total) if node.meta["val"].is_floating_point() else None


def _normalized(node: Any) -> _Normalized | None:
    """`x * rsqrt(mean(x^2) + eps)` over the last dim, or the same of `x - mean(x)`."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for x, factor in both_orders(node):
        if _power(factor) != -0.5 and not is_call(factor, aten.rsqrt.default):
            continue
        shifted = operand(factor, 0)
        if not is_call(shifted, aten.add.Tensor):
            continue
        mean, eps = pair(shifted)
        squared = _squared(_averaged(mean))
        if not isinstance(eps, float) or not isinstance(x, fx.Node) or squared is None:
            continue
        if squared is x:
            whole = _centered(x)
            return _Normalized(x, eps, False) if whole is None else _Normalized(whole, eps, True)
        whole = _centered(x)
        if whole is not None and _centered(squared) is whole:
            return _Normalized(whole, eps, True)
    return None


def _averaged(node: Any) -> Any:
    """What this is the mean of over the last dim, which is kept; None if it is no such mean."""
    if not is_call(node, aten.mean.dim):
        return None
    given = arguments(node)
    last = given["dim"] in ([-1], [node.meta["val"].dim() - 1])
    return given["self"] if last and given["keepdim"] else None


def _squared(node: Any) -> fx.Node | None:
    """x where this is its square."""
    if is_call(node, aten.square.default) or _power(node) == 2:
        return operand(node, 0)
    if is_call(node, aten.mul.Tensor):
        left, right = pair(node)
        return left if left is right else None
    return None


def _power(node: Any) -> Any:
    """The number that this raises its input to, or None."""
    return arguments(node)["exponent"] if is_call(node, aten.pow.Tensor_Scalar) else None


def _centered(node: fx.Node) -> fx.Node | None:
    """x where this is `x - mean(x)`."""
    if not is_call(node, aten.sub.Tensor) or node.kwargs:
        return None
    x, mean = pair(node)
    return x if isinstance(x, fx.Node) and _averaged(mean) is x else None
