"""What the rewrites of fuse-ascend have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from panguq.ir.edit import call, erase_unused, value_types
from panguq.kernels.ascend.vendor.contracts import violations
from panguq.lowering.ascend.formats import formats_of
from panguq.passes.pipeline.base import PassResult


class FusionState:
    """What one run keeps: its result, and nodes that several layers need, made once.

    Such nodes are negated masks and rotary tables with a heads axis. They stand in front of their
    first reader; readers must be visited in graph order.
    """

    def __init__(self, result: PassResult) -> None:
        self.result = result
        self._made: dict[Any, fx.Node] = {}

    def once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        """The node that was made under this key, or `make()`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def call_once(
        self, before: fx.Node, op: OpOverload, args: tuple[Any, ...], *, suffix: str
    ) -> fx.Node:
        """`op(*args)`; a new node stands in front of `before` and belongs to `args[0]`."""
        return self.once((op, args), lambda: call(before, op, args, origin=args[0], suffix=suffix))

    def erase_unread(self) -> None:
        """Drop what was made for a fusion that did not happen."""
        erase_unused(n for n in self._made.values() if not getattr(n, "_erased", False))


def refusal(
    op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> str | None:
    """What the op's contract says against this call of nodes, with its source; None if legal."""
    named = dict(kwargs or {})
    formats = formats_of(op, args, named)
    broken = violations(op, value_types(args), value_types(named), formats=formats)
    return "; ".join(str(violation) for violation in broken) or None


def size_key(size: int | torch.SymInt) -> Any:
    """A size to compare: its expression if it is symbolic. Comparing sizes adds guards."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have the same sizes, symbols included."""
    sizes = [[size_key(s) for s in node.meta["val"].shape] for node in (one, other)]
    return sizes[0] == sizes[1]
