"""What patterns ask about nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from panguq.ir.call_arguments import arguments, operand

aten = torch.ops.aten

CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether this is a node that calls one of these."""
    return isinstance(node, fx.Node) and node.target in targets


def type_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node's value."""
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def through_casts(node: Any) -> Any:
    """What was cast, if anything, to give this node."""
    while is_call(node, *CASTS):
        node = operand(node, 0)
    return node


def through_wider_casts(node: Any) -> Any:
    """The same past casts that lose nothing."""
    while is_call(node, *CASTS):
        source = operand(node, 0)
        if torch.promote_types(type_of(source), type_of(node)) != type_of(node):
            break
        node = source
    return node


def pair(node: fx.Node) -> tuple[Any, Any]:
    """The two terms or factors of `aten.add.Tensor`, `aten.sub.Tensor` or `aten.mul.Tensor`."""
    given = arguments(node)
    return given["self"], given["other"]


def both_orders(node: fx.Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The pair, and the pair the other way round."""
    left, right = pair(node)
    return (left, right), (right, left)
