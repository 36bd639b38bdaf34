"""Part of a graph between a router and its experts, run again with other choices.

An expert that calibration sends few tokens to would be calibrated on chance. What it would make of
all tokens is known without a word to the router: the nodes between are run once more, with every
token sent to that expert. What else they read, such as a router's scores, is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.call_arguments import argument, operand
from panguq.ir.edit import ancestors
from panguq.ir.ops.experts import route_tokens
from panguq.ir.run.interpret import compute
from panguq.ir.views import ExpertLinear, Item, QuantizedInput


def routing_of(linear: fx.Node) -> fx.Node:
    """The call of `route_tokens` that sorts this expert linear's rows."""
    item = Item.of(ExpertLinear.of(linear).counts)
    return item.source


def order_of(linear: fx.Node) -> tuple[fx.Node, int]:
    """int64 `[r]`, which pair of token and choice each row of an expert linear is, and how many
    choices a token has: row i belongs to token `order[i] // top_k`."""
    routing = routing_of(linear)
    items = (Item.match(user) for user in routing.users)
    order = next(item.node for item in items if item is not None and item.index == 0)
    return order, int(operand(routing, 0).meta["val"].shape[1])


@dataclass(frozen=True)
class Reroute:
    """A routing, the values that its experts read, and how every token would reach them."""

    routing: fx.Node
    values: tuple[fx.Node, ...]

    @property
    def last(self) -> fx.Node:
        """The value after which all that is read is known."""
        order = {node: index for index, node in enumerate(self.routing.graph.nodes)}
        return max(self.values, key=order.__getitem__)

    def nodes(self) -> list[fx.Node]:
        """What is run again, in graph order."""
        needed = ancestors(self.values, stop=[self.routing])
        follows: set[fx.Node] = {self.routing}
        found = []
        for node in self.routing.graph.nodes:
            if node in needed and node is not self.routing and follows & {*node.all_input_nodes}:
                follows.add(node)
                found.append(node)
        return found

    def reads(self) -> set[fx.Node]:
        """What that reads from elsewhere, and the routing's own input."""
        again = {*self.nodes(), self.routing}
        read = {source for node in again for source in node.all_input_nodes}
        return read - again

    def is_shared(self, value: fx.Node) -> bool:
        """Whether every expert would meet the same rows of this value, bit for bit.

        So it is with the tokens themselves, sorted and at most quantized: nothing in them depends
        on the expert, and sorting keeps the order of one expert's tokens.
        """
        read = QuantizedInput.match(value)
        rows = value if read is None else read.source
        if rows.target is not torch.ops.panguq.permute_tokens.default:
            return False
        tokens, order = operand(rows, 0), Item.match(operand(rows, 1))
        again = {*self.nodes(), self.routing}
        return tokens not in again and order is not None and order.source is self.routing

    def rows(
        self, gm: fx.GraphModule, values: Mapping[fx.Node, Any], experts: Sequence[int]
    ) -> Iterator[tuple[int, fx.Node, Tensor]]:
        """Each of these experts with each value and its rows of it, `[tokens, k]`.

        `values` has what `reads` names.
        """
        again = self.nodes()
        ids = values[operand(self.routing, 0)]
        for chosen, asked in self._shares(experts, int(ids.shape[1])):
            routed = route_tokens(asked.expand_as(ids), int(argument(self.routing, 1)))
            found: dict[fx.Node, Any] = {self.routing: routed}
            starts = [0, *routed[1].cumsum(0).tolist()]
            for node in again:
                inputs = {n: found[n] if n in found else values[n] for n in node.all_input_nodes}
                found[node] = compute(gm, node, inputs)
            for node in self.values:
                for expert in chosen:
                    yield expert, node, found[node][starts[expert] : starts[expert + 1]]

    def _shares(self, experts: Sequence[int], top_k: int) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The experts, `top_k` at a time, and ids `[top_k]` that hold them and no one twice."""
        everyone = range(int(argument(self.routing, 1)))
        for start in range(0, len(experts), top_k):
            chosen = experts[start : start + top_k]
            others = [expert for expert in everyone if expert not in chosen]
            yield chosen, torch.tensor([*chosen, *others][:top_k])
