"""Following something that values carry through a graph, until all that must carry it does.

A scale per channel (`channels.py`) and a rotation (`rotations.py`) are followed alike: from one
value to all that reads or makes it, by one rule per op, and through the cache from what one call
returns to what the next one is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import fx

from panguq.ir.edit import label
from panguq.ir.interface import Interface

State = TypeVar("State")


@dataclass(frozen=True)
class Blocked:
    """A node from whose value nothing can move, and why."""

    node: fx.Node
    reason: str


class Stop(Exception):
    """What is followed cannot move; the message says why."""


class GraphWalk(ABC, Generic[State]):
    """All values that have to carry something together, each in a `State` of its own.

    Rules call `state`, `carry` and `stop`; an op's rule is asked again whenever one of the op's
    operands or its result starts to carry something.
    """

    def __init__(self, gm: fx.GraphModule, interface: Interface) -> None:
        self.gm = gm
        self.states: dict[fx.Node, State] = {}
        self._cache_pairs = interface.cache_pairs()
        self._output_names = interface.outputs
        self._queue: deque[fx.Node] = deque()

    def state(self, node: object) -> State | None:
        """How this value carries it; None if it does not."""
        return self.states.get(node) if isinstance(node, fx.Node) else None

    @abstractmethod
    def carry(self, value: fx.Node, state: State) -> None:
        """Require that `value` carries it in this way. Raises Stop."""

    @abstractmethod
    def visit_op(self, node: fx.Node) -> None:
        """Apply the rule of a called op. Raises Stop."""

    def stop(self, node: fx.Node, why: str) -> NoReturn:
        """Nothing moves: `node` is what cannot take it."""
        raise Stop(f"{label(node)} {why}")

    def refuse(self, value: fx.Node, reader: fx.Node, why: str) -> NoReturn:
        """Nothing moves: `reader` cannot take it from `value`."""
        also = "also " if len(value.users) > 1 else ""
        raise Stop(f"{label(value)} is {also}read by {label(reader)}, which {why}")

    def put(self, value: fx.Node, state: State) -> None:
        """Let `value` carry it, and ask whatever makes and reads it."""
        self.states[value] = state
        self._queue.append(value)
        self._queue.extend(value.users)

    def finish(self) -> None:
        """Ask rules until every one is satisfied. Raises Stop."""
        while self._queue:
            node = self._queue.popleft()
            if node.op == "placeholder":
                self._visit_placeholder(node)
            elif node.op == "output":
                self._visit_output(node)
            elif node.target is not torch.ops.aten.sym_size.int:
                self.visit_op(node)

    def _visit_output(self, output: fx.Node) -> None:
        """A cache may carry it if what continues it does; other outputs may not."""
        past_of = {new: past for past, new in self._cache_pairs.items()}
        results = output.args[0]
        assert isinstance(results, (tuple, list))
        for value, name in zip(results, self._output_names, strict=True):
            state = self.state(value)
            if state is not None and name not in past_of:
                raise Stop(f"{label(value)} is an output of the graph")
            if state is not None:
                self.carry(self._placeholder(past_of[name]), state)

    def _visit_placeholder(self, node: fx.Node) -> None:
        name = self._cache_pairs.get(str(node.target))
        if name is None:
            raise Stop(f"{label(node)} is an input of the graph")
        results = next(reversed(self.gm.graph.nodes)).args[0]
        self.carry(results[self._output_names.index(name)], self.states[node])

    def _placeholder(self, name: str) -> fx.Node:
        return next(n for n in self.gm.graph.nodes if n.op == "placeholder" and n.target == name)


CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


def uncast(reader: fx.Node, weight: Any) -> tuple[fx.Node, Any]:
    """What reads a weight as it is stored, and that weight: `reader` and `weight` themselves, or
    a cast of it that nothing else reads, as before a router that computes in a wider dtype."""
    while isinstance(weight, fx.Node) and weight.target in CASTS and len(weight.users) == 1:
        reader, weight = weight, weight.args[0]
    return reader, weight


def first_arguments(node: fx.Node, count: int) -> list[Any]:
    """The first `count` positional arguments, None where the call gives fewer."""
    return [*node.args, *[None] * count][:count]
