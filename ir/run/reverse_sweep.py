"""The gradient of a scalar through a graph, block by block, at the inputs and outputs of matmuls.

A forward sweep keeps only what enters each block (`ir/analysis/blocks.py`). Then, from the last
block to the first, each batch runs a block once more under autograd and hands its gradient on to
the block before, so that one block's weights and intermediate values are alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from panguq.ir.analysis.blocks import blocks
from panguq.ir.call_arguments import arguments, operand
from panguq.ir.edit import ancestors, label
from panguq.ir.ops import encode, quantize  # noqa: F401  (register the ops matched here)
from panguq.ir.ops.experts import each_experts_rows
from panguq.ir.ops.opset import body_of
from panguq.ir.run import interpret
from panguq.ir.run.interpret import (
    Values,
    compute,
    ensure_finite,
    without_inputs,
)
from panguq.ir.run.reroute import order_of
from panguq.ir.views import ExpertLinear, Item, Linear, QuantizedInput, results_of
from panguq.tensors import spill

Gradient = Callable[[Tensor], Tensor]
"""From the graph's first output for one batch to the gradient of the scalar there, same shape."""


class Seen(NamedTuple):
    """A matmul's input x `[.., k]` and the gradient at its output `[.., n]`; of experts also how
    many of the rows, sorted by expert, each one has, int64 `[experts]`, whose weights there are,
    and which token each row is, int64 `[r]`."""

    x: Tensor
    gradient: Tensor
    counts: Tensor | None = None
    members: tuple[int, ...] | None = None
    tokens: Tensor | None = None

    def by_expert(self) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Each expert that has rows and a weight: its place in the weight, which rows these are, x
        there and the gradient, `[r, ..]`; place 0 and all rows where there are no experts.
        """
        x, gradient = (t.reshape(-1, t.shape[-1]) for t in (self.x, self.gradient))
        if self.counts is None:
            yield 0, slice(None), x, gradient
            return
        for place, rows in each_experts_rows(self.counts, self.members):
            if place is not None:
                yield place, rows, x[rows], gradient[rows]


ObserveGradients = Callable[[dict[fx.Node, Seen]], None]
"""Called for one block and batch with what was seen at its watched nodes."""


@dataclass(frozen=True)
class Block:
    """Nodes in graph order, what they read from outside, and what others read of them.

    `weights` are read, too: nodes that depend only on stored tensors, the same for all batches.
    """

    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def reverse_sweep(
    gm: fx.GraphModule,
    batches: Sequence[dict[str, Tensor]],
    watch: Iterable[fx.Node],
    gradient: Gradient,
    observe: ObserveGradients,
    block_done: Callable[[], None],
    progress: Callable[[str, int, int], None],
) -> None:
    """Call `observe` for every batch and each block that holds a watched node, last block first.

    A watched node is a `linear`, of experts or not; its weight may have any floating dtype.
    `block_done` is called when all batches have passed such a block. Watched nodes that the first
    output does not depend on are never observed. Raises NumericsError for a weight, an input of a
    watched node or an output that is not finite.
    """
    end = results_of(gm)[0]
    steps = _blocks(gm, end)
    watched = {n for step in steps for n in step.nodes} & set(watch)
    active = _descendants(gm, watched)
    total = 2 * len(steps)
    kept = _forward(
        gm, batches, steps, watched, lambda done: progress("gradient sweep", done, total), steps
    )
    gradients: list[dict[fx.Node, Tensor]] = [{} for _ in batches]
    for done, step in enumerate(reversed(steps)):
        progress("gradient sweep", len(steps) + done, total)
        if not active.intersection(step.nodes):
            break  # nothing watched lies further up
        weights = _weights(gm, step)
        for start, pending in zip(kept.pop(), gradients, strict=True):
            found = _recompute(step, start | weights, watched, active)
            if end in step.nodes:
                ensure_finite(label(end), found[end].detach(), "activation")
                pending[end] = gradient(found[end].detach())
            seen = _backward(step, found, watched, pending)
            if seen:
                observe(seen)
        if watched.intersection(step.nodes):
            block_done()
    progress("gradient sweep", total, total)


class FirstOutput:
    """The graph's first output for each of several batches, at the cost of its last block.

    What enters that block is kept; all before it runs once. Raises as `reverse_sweep`.
    """

    def __init__(self, gm: fx.GraphModule, batches: Sequence[dict[str, Tensor]]) -> None:
        self._gm = gm
        self._end = results_of(gm)[0]
        steps = _blocks(gm, self._end)
        self._last = steps[-1]
        self._inputs = _forward(gm, batches, steps, set(), lambda done: None, steps[-1:])[-1]

    def of(self, index: int) -> Tensor:
        """The output for the batch with this index."""
        environment = self._inputs[index] | _weights(self._gm, self._last)
        with torch.no_grad():
            for node in self._last.nodes:
                environment[node] = compute(self._gm, node, environment)
        value: Tensor = environment[self._end]
        return value


def _blocks(gm: fx.GraphModule, end: fx.Node) -> list[Block]:
    fixed = without_inputs(gm)
    needed = ancestors([end]) - fixed
    parts = [[n for n in block if n in needed] for block in blocks(gm)]
    found = []
    waiting: list[fx.Node] = []  # a block that ends in codes: gradients pass where they are read
    for part in parts:
        waiting += part
        inside = set(waiting)
        outputs = [n for n in waiting if n is end or any(u in needed - inside for u in n.users)]
        if not waiting or any(_is_rounded(n) for n in outputs):
            continue
        read = dict.fromkeys(s for n in waiting for s in n.all_input_nodes)
        weights = [s for s in read if s in fixed]
        inputs = [s for s in read if s not in inside and s not in fixed]
        found.append(Block(tuple(waiting), tuple(weights), tuple(inputs), tuple(outputs)))
        waiting = []
    return found


def _weights(gm: fx.GraphModule, step: Block) -> Values:
    """The weights that a block reads; raises NumericsError for one that is not finite."""
    weights = interpret.values(gm, {}, step.weights)
    for node, weight in weights.items():
        if isinstance(weight, Tensor):
            ensure_finite(label(node), weight)
    return weights


def _is_rounded(node: fx.Node) -> bool:
    """Whether this is, or holds, the codes or the scale of an activation."""
    item = Item.match(node)
    source = node if item is None else item.source
    return source.target in (
        torch.ops.panguq.quantize_per_tensor.default,
        torch.ops.panguq.quantize_per_token.default,
        torch.ops.panguq.encode_per_token.default,
    )


def _descendants(gm: fx.GraphModule, sources: set[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in gm.graph.nodes:
        if any(s in found for s in node.all_input_nodes):
            found.add(node)
    return found


def _forward(
    gm: fx.GraphModule,
    batches: Sequence[dict[str, Tensor]],
    steps: Sequence[Block],
    watched: set[fx.Node],
    progress: Callable[[int], None],
    wanted: Sequence[Block],
) -> list[list[Values]]:
    """What enters each wanted block, for every batch. The last block is not run."""
    environments: list[Values] = [
        {n: batch[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder"}
        for batch in batches
    ]
    kept: list[list[Values]] = []
    held = 0
    with torch.no_grad():
        for done, step in enumerate(steps):
            progress(done)
            if step in wanted:
                kept.append([{n: known[n] for n in step.inputs} for known in environments])
            later = {n for after in steps[done + 1 :] for n in after.inputs}
            if not later:
                break
            weights = _weights(gm, step)
            for row, environment in enumerate(environments):
                environment |= weights
                for node in step.nodes:
                    if node in watched:
                        x = Linear.of(node).input
                        ensure_finite(label(x), environment[x], "activation")
                    environment[node] = compute(gm, node, environment)
                environments[row] = {n: v for n, v in environment.items() if n in later}
            outputs = later.intersection(step.outputs)
            held += sum(spill.held_bytes(known[n]) for known in environments for n in outputs)
            if held > spill.SPILL_BYTES:
                spill.to_files(environments)
    return kept


def _recompute(
    step: Block, start: Values, watched: set[fx.Node], active: set[fx.Node]
) -> dict[fx.Node, Any]:
    """Every value of the block, recorded by autograd from its active inputs on."""
    values: dict[fx.Node, Any] = dict(start)
    for node in step.inputs:
        if node in active and isinstance(values[node], Tensor):
            wanted = values[node].is_floating_point()
            values[node] = values[node].detach().requires_grad_(wanted)
    with torch.enable_grad():
        for node in step.nodes:
            values[node] = recorded(node, values)
            if node in watched and not values[node].requires_grad:
                values[node].requires_grad_()  # nothing before it does: a leaf
    return values


def recorded(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The node's value as autograd records it, from its inputs' values.

    The gradient of a rounded activation passes on as if it were not rounded.
    """
    args = fx.map_arg(node.args, lambda n: values[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: values[n])
    assert callable(node.target)
    return _straight_through(node, body_of(node.target)(*args, **kwargs), values)


def _straight_through(node: fx.Node, value: Any, values: dict[fx.Node, Any]) -> Any:
    """The node's value; where codes of an activation were read, with the activation's gradient."""
    quantized = QuantizedInput.match(node)
    if quantized is None:
        return value
    source = _unrounded(quantized.quantizer, value, values)
    if source is None or not source.requires_grad:
        return value
    return source + (value - source).detach()


def _unrounded(quantizer: fx.Node, value: Tensor, values: dict[fx.Node, Any]) -> Tensor | None:
    """The float that became `value`, if it is known; of a cache, whose past comes as codes, what
    those stand for, and behind it the float of the new tokens."""
    if quantizer.target is not torch.ops.aten.cat.default:
        return values.get(operand(quantizer, 0))
    given = arguments(quantizer)
    source = values.get(operand(given["tensors"][-1], 0))
    if source is None:
        return None
    past = value.shape[given["dim"]] - source.shape[given["dim"]]
    return torch.cat((value.narrow(given["dim"], 0, past).detach(), source), given["dim"])


def _backward(
    step: Block, values: dict[fx.Node, Any], watched: set[fx.Node], pending: dict[fx.Node, Tensor]
) -> dict[fx.Node, Seen]:
    """Take this block's gradients from `pending`, leave those of its inputs there instead."""
    outputs = [n for n in step.outputs if n in pending and values[n].requires_grad]
    at = [pending.pop(n) for n in outputs]
    needs = [n for n in step.inputs if isinstance(values[n], Tensor) and values[n].requires_grad]
    matmuls = [n for n in step.nodes if n in watched]
    if not outputs or not (needs or matmuls):
        return {}
    wanted = [values[n] for n in (*needs, *matmuls)]
    found = torch.autograd.grad([values[n] for n in outputs], wanted, at, allow_unused=True)
    for node, found_here in zip(needs, found, strict=False):
        if found_here is not None:
            earlier = pending.get(node)
            pending[node] = found_here if earlier is None else earlier + found_here
    seen = zip(matmuls, found[len(needs) :], strict=True)
    return {
        node: Seen(values[Linear.of(node).input].detach(), found_here, *_division(node, values))
        for node, found_here in seen
        if found_here is not None
    }


def _division(
    matmul: fx.Node, values: dict[fx.Node, Any]
) -> tuple[Tensor | None, tuple[int, ...] | None, Tensor | None]:
    experts = ExpertLinear.match(matmul)
    if experts is None:
        return None, None, None
    order, top_k = order_of(matmul)
    tokens = None if order not in values else values[order].div(top_k, rounding_mode="floor")
    return values[experts.counts], experts.members, tokens
