"""The pieces of a graph that are learned one after the other, float and quantized side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from panguq.ir.analysis.blocks import blocks
from panguq.ir.edit import ancestors, label
from panguq.ir.ops.opset import body_of
from panguq.ir.run import interpret
from panguq.ir.run.interpret import Values, ensure_finite, without_inputs
from panguq.ir.views import Linear, results_of
from panguq.tensors import spill

SMALLEST_SQUARE = 1e-30  # of a token's values, which its error is divided by


@dataclass(frozen=True)
class Piece:
    """Nodes in graph order, the stored tensors that they read, and what is read of them later.

    `compared` are the outputs that depend on a linear that is learned; `kept` is what the pieces
    behind this one read of all that is known by then.
    """

    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    compared: tuple[fx.Node, ...]
    kept: frozenset[fx.Node]

    @property
    def name(self) -> str:
        """The label of the value that it ends in."""
        return label(self.outputs[-1])


def pieces_of(gm: fx.GraphModule, linears: set[fx.Node], at_once: int) -> list[Piece]:
    """The graph up to the last of these linears, cut where one value carries everything
    (`ir/analysis/blocks.py`); `at_once` blocks with such a linear make a piece."""
    end = results_of(gm)[0]
    fixed = without_inputs(gm)
    needed = ancestors([end]) - fixed
    parts: list[list[fx.Node]] = [[]]
    held = 0
    for block in blocks(gm):
        part = [n for n in block if n in needed and n.op == "call_function"]
        has = not linears.isdisjoint(part)
        if has and held == at_once:
            parts.append([])
            held = 0
        parts[-1] += part
        held += has
    found = []
    for index, part in enumerate(parts):
        later = {s for rest in parts[index + 1 :] for n in rest for s in n.all_input_nodes}
        weights = dict.fromkeys(s for n in part for s in n.all_input_nodes if s in fixed)
        outputs = tuple(n for n in part if n is end or n in later)
        changed = _behind(part, linears)
        compared = tuple(n for n in outputs if n in changed and _is_float(n))
        found.append(Piece(tuple(part), tuple(weights), outputs, compared, frozenset(later)))
        if not linears.intersection(later.union(*parts[index + 1 :])):
            break
    return found


def _behind(part: Sequence[fx.Node], sources: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in part:
        if node in sources or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_float(node: fx.Node) -> bool:
    val = node.meta["val"]
    return isinstance(val, Tensor) and val.is_floating_point()


@dataclass(frozen=True)
class RoundedLinear:
    """A linear in quantized form: its rounded weight `[n, k]`, and what makes its input of the
    float one, called once for all linears that have the same one."""

    weight: Tensor
    rounded_input: Callable[[Tensor], Tensor]


def run_piece(
    nodes: Sequence[fx.Node], values: Values, rounded: Mapping[fx.Node, RoundedLinear]
) -> None:
    """Add the value of every node to `values`, recorded by autograd where that is on."""
    inputs: dict[tuple[fx.Node, Callable[[Tensor], Tensor]], Tensor] = {}
    for node in nodes:
        if node in rounded:
            linear, how = Linear.of(node), rounded[node].rounded_input
            x = values[linear.input]
            if (linear.input, how) not in inputs:
                inputs[linear.input, how] = how(x)
            bias = None if linear.bias is None else values[linear.bias].float()
            result = functional.linear(inputs[linear.input, how], rounded[node].weight, bias)
            values[node] = result.to(x.dtype)
            continue
        args = fx.map_arg(node.args, lambda n: values[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
        assert callable(node.target)
        values[node] = body_of(node.target)(*args, **kwargs)


class TwoRuns:
    """What the float and the quantized graph have computed of all batches, up to one piece.

    Values of more than `spill.SPILL_BYTES` wait in files.
    """

    def __init__(self, gm: fx.GraphModule, batches: Sequence[dict[str, Tensor]]) -> None:
        self._gm = gm
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.floats: list[Values] = [{n: b[str(n.target)] for n in inputs} for b in batches]
        self.quantized: list[Values] = [dict(known) for known in self.floats]

    def weights(self, piece: Piece) -> Values:
        """The stored tensors that a piece reads; raises NumericsError for one not finite."""
        found = interpret.values(self._gm, {}, piece.weights)
        for node, weight in found.items():
            if isinstance(weight, Tensor):
                ensure_finite(label(node), weight)
        return found

    def float_step(self, piece: Piece, weights: Values) -> Iterator[tuple[Values, Values]]:
        """Run the piece in the float graph; yields, for each batch, all its values and the
        compared ones. Raises NumericsError for one of these that is not finite."""
        for known in self.floats:
            values = known | weights
            with torch.no_grad():
                run_piece(piece.nodes, values, {})
            compared = {n: values[n] for n in piece.compared}
            for node, value in compared.items():
                ensure_finite(label(node), value, "activation")
            yield values, compared
            _move_on(known, values, piece)

    def quantized_step(
        self, piece: Piece, weights: Values, rounded: Mapping[fx.Node, RoundedLinear]
    ) -> None:
        """Run the piece in the quantized graph."""
        for known in self.quantized:
            values = known | weights
            with torch.no_grad():
                run_piece(piece.nodes, values, rounded)
            _move_on(known, values, piece)
        everything = [*self.floats, *self.quantized]
        if sum(spill.held_bytes(v) for known in everything for v in known.values()) > (
            spill.SPILL_BYTES
        ):
            spill.to_files(everything)


def _move_on(known: Values, values: Values, piece: Piece) -> None:
    for node in [n for n in known if n not in piece.kept]:
        del known[node]
    known.update({n: values[n] for n in piece.outputs if n in piece.kept})


def token_errors(found: Mapping[fx.Node, Any], wanted: Mapping[fx.Node, Any]) -> Tensor:
    """Each token's squared error over its square, of one value after the other, `[tokens]`."""
    return torch.cat([_relative(found[node], value) for node, value in wanted.items()])


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    rows, targets = (v.reshape(-1, v.shape[-1]).float() for v in (found, wanted))
    size = targets.square().sum(-1).clamp_min(SMALLEST_SQUARE)
    return (rows - targets).square().sum(-1) / size
