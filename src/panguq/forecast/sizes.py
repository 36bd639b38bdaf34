"""The sizes of a graph's values once its open sizes are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from panguq.ir.interface import Interface


class OpenSizes:
    """Shapes of a graph for `{"batch": 1, "seq": 512, "past": 0, "kept": 1}`, by the names that the
    interface gives to open sizes."""

    def __init__(self, gm: fx.GraphModule, interface: Interface, given: Mapping[str, int]) -> None:
        self.given = dict(given)
        self._values: dict[sympy.Symbol, int] = {}
        self._known: dict[sympy.Expr, int] = {}
        for node in gm.graph.nodes:
            if node.op != "placeholder" or node.name not in interface.input_shapes:
                continue
            names = interface.input_shapes[node.name]
            for size, name in zip(node.meta["val"].shape, names, strict=True):
                expression = size.node.expr if isinstance(size, torch.SymInt) else None
                if isinstance(expression, sympy.Symbol) and name in given:
                    self._values[expression] = given[str(name)]

    def shape(self, node: fx.Node) -> list[int]:
        """The sizes of the node's value, a tensor."""
        return self.of(node.meta["val"])

    def of(self, value: Tensor) -> list[int]:
        """The sizes of a fake tensor of the graph."""
        return [self._size(size) for size in value.shape]

    def count(self, node: fx.Node) -> int:
        """The elements of the node's value, a tensor."""
        return math.prod(self.shape(node))

    def _size(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self._known:
            self._known[expression] = int(expression.subs(self._values))
        return self._known[expression]


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that it reads and whose values are tensors."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
