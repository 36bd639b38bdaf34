"""Cut a graph into parts that are compiled and calls in between that run as they are.

A part is all that can be computed before the next call that stays: attention, what reads the cache
or the mask, and every op that the compiler is given no body for. Parts of equal text share their
code, since weights are inputs of it; so all equal layers of a model need one compilation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.ops.opset import name_of
from panguq.lowering.run.write_into_cache import PAST_LENGTH

_SIZE = torch.ops.aten.sym_size.int
_EFFECTS = (
    torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten.copy_.default,
)  # fmt: skip
Staying = Callable[[fx.Node], bool]


@dataclass(frozen=True)
class GraphPart:
    """Nodes that are compiled together: what they read, compute and give to others.

    `nodes` are in graph order, with copies of the sizes that they read; `inputs` are values,
    `weights` stored tensors, both in the order of their first use.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    def text(self, describe: Callable[[fx.Node], str]) -> str:
        """The part with numbers for names, so that equal parts have equal texts; `describe` says
        what matters of a value or a weight that it reads."""
        read = (*self.inputs, *self.weights)
        number = {node: str(index) for index, node in enumerate((*read, *self.nodes))}
        lines = [describe(node) for node in read]
        for node in self.nodes:
            args = fx.map_arg((node.args, node.kwargs), lambda n: _Number(number[n]))
            lines.append(f"{number[node]} = {name_of(node.target)} {args}")
        return "\n".join([*lines, " ".join(number[node] for node in self.results)])


class _Number(str):
    """A node's number, which no string argument looks like."""

    def __repr__(self) -> str:
        return f"%{self}"


def digest(text: str) -> str:
    """A name for a text: 32 hexadecimal digits of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_size(node: fx.Node) -> bool:
    """Whether this is a size of a tensor, or computed from sizes alone."""
    if node.op != "call_function":
        return node.op == "placeholder" and node.target == PAST_LENGTH
    if node.target is _SIZE:
        return True
    sources = node.all_input_nodes
    return bool(sources) and all(map(is_size, sources))


def cut(gm: fx.GraphModule, stays: Staying) -> list[GraphPart | fx.Node]:
    """The parts and the calls that stay, in an order in which they can run.

    Sizes are no steps: whoever reads one computes it. What reads memory comes after the writes
    before it.
    """
    level: dict[fx.Node, int] = {}
    written: dict[fx.Node, int] = {}  # memory, and where it is written into
    staying: set[fx.Node] = set()
    groups: dict[int, list[fx.Node]] = {}
    calls: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_size(node):
            continue
        sources = [n for n in values_read(node) if n in level]
        if stays(node) or node.target in _EFFECTS or _is_item_of(node, staying):
            staying.add(node)
            memory = node.all_input_nodes[:1]
            after = [written[n] for n in memory if n in written]
            level[node] = max([0, *(level[n] for n in sources), *after])
            if node.target is torch.ops.aten.copy_.default:
                written[memory[0].all_input_nodes[0]] = level[node]
            calls.setdefault(level[node], []).append(node)
        else:
            level[node] = max((level[n] + (n in staying) for n in sources), default=0)
            groups.setdefault(level[node], []).append(node)
    steps: list[GraphPart | fx.Node] = []
    for index in range(max(level.values(), default=-1) + 1):
        if index in groups:
            steps.append(_part(groups[index]))
        steps += calls.get(index, [])
    return steps


def _is_item_of(node: fx.Node, staying: set[fx.Node]) -> bool:
    return name_of(node.target) == "operator.getitem" and any(
        source in staying for source in node.all_input_nodes
    )


def _part(computing: list[fx.Node]) -> GraphPart:
    nodes: dict[fx.Node, None] = {}
    inputs: dict[fx.Node, None] = {}
    weights: dict[fx.Node, None] = {}
    own = set(computing)

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in nodes:
                continue
            if source.op == "get_attr":
                weights[source] = None
            elif is_size(source):
                visit(source)
            elif source not in own:
                inputs[source] = None
        nodes[node] = None

    for node in computing:
        visit(node)
    results = [n for n in computing if any(reader not in own for reader in _readers(n))]
    return GraphPart(tuple(nodes), tuple(inputs), tuple(weights), tuple(results))


def values_read(node: fx.Node) -> list[fx.Node]:
    """The values that a node reads, or reads sizes of, and the number of past tokens if it does."""
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        found += values_read(source) if _is_computed_size(source) else [source]
    return found


def _is_computed_size(node: fx.Node) -> bool:
    return node.op == "call_function" and is_size(node)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read this value, or sizes of it."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(user) if is_size(user) else [user]
    return found


def part_module(part: GraphPart, body: Callable[[Any], Callable[..., Any]]) -> fx.GraphModule:
    """The part as a module of its inputs and weights, each op written as `body` says."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate((*part.inputs, *part.weights)):
        copies[node] = graph.placeholder(f"read_{index}")
    for node in part.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        copies[node] = graph.call_function(body(node.target), args, kwargs)
    graph.output(tuple(copies[node] for node in part.results))
    return fx.GraphModule(torch.nn.Module(), graph)


def stored_tensor(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a `get_attr` node of a prepacked graph reads."""
    tensor: Tensor = getattr(gm, str(node.target))
    return tensor
