"""The arguments of a call, by position or by name: what views are made of.

Outside of the IR, views and these functions read arguments; a position would say nothing there.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload

from panguq.ir.edit import label


def calls(node: fx.Node, op: str) -> bool:
    """Whether the node calls this op, `aten::linear` or `aten::add.Tensor`."""
    return isinstance(node.target, OpOverload) and node.target.name() == op


def argument(node: fx.Node, position: int) -> Any:
    """The argument at this position. Raises IndexError where the call leaves it out."""
    return node.args[position]


def operand(node: fx.Node, position: int) -> fx.Node:
    """The node that is read at this position. Raises TypeError, naming the call, if none is."""
    found = optional_operand(node, position)
    if found is None:
        raise TypeError(f"argument {position} of {label(node)} is no node")
    return found


def optional_operand(node: fx.Node, position: int) -> fx.Node | None:
    """The node that is read at this position, or None: an argument left out, None or a number."""
    found = node.args[position] if len(node.args) > position else None
    return found if isinstance(found, fx.Node) else None


def operands_at(node: fx.Node, position: int) -> list[fx.Node]:
    """The nodes at this position: one, or those of a list. Raises TypeError for anything else."""
    found = node.args[position]
    parts = found if isinstance(found, (list, tuple)) else (found,)
    nodes = [part for part in parts if isinstance(part, fx.Node)]
    if len(nodes) < len(parts):
        raise TypeError(f"argument {position} of {label(node)} holds something that is no node")
    return nodes


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of the op's schema, defaults included.

    Raises TypeError for a node that calls no op with a schema.
    """
    if not isinstance(node.target, OpOverload):
        raise TypeError(f"{label(node)} calls {node.target}, which has no schema")
    found: dict[str, Any] = {}
    for position, formal in enumerate(node.target._schema.arguments):
        if formal.name in node.kwargs:
            found[formal.name] = node.kwargs[formal.name]
        elif position < len(node.args) and not formal.kwarg_only:
            found[formal.name] = node.args[position]
        else:
            found[formal.name] = formal.default_value if formal.has_default_value() else None
    return found
