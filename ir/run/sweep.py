"""Run calibration batches through a graph block by block, showing values to an observer.

A sweep may also *pause* where a value is ready for all batches, so that weights that read it can be
chosen from it and the rest of the model sees what was chosen: one sweep quantizes a whole model
layer after layer, in the order in which data flows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.analysis.blocks import blocks
from panguq.ir.call_arguments import operand
from panguq.ir.edit import ancestors, label
from panguq.ir.run.float_model import float_weight, is_quantization
from panguq.ir.run.interpret import Values, compute, ensure_finite, last_uses, without_inputs
from panguq.ir.run.reroute import Reroute
from panguq.tensors import spill
from panguq.tensors.memory import return_free_pages

Observe = Callable[[fx.Node, Tensor], None]
Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)` by work that takes long."""

Chosen = Mapping[fx.Node, Tensor]
"""Values that stand for what these nodes would compute from here on; none depends on an input."""

Pause = Callable[[Sequence[Tensor], Sequence[Tensor]], Chosen]
"""Called with a value of every batch and with the same of the float model (empty without it)."""


@dataclass(frozen=True)
class AllTokens:
    """Experts that are to be shown all tokens: `observe(expert, node, rows)` for each batch."""

    reroute: Reroute
    experts: Sequence[int]
    observe: Callable[[int, fx.Node, Tensor], None]


@dataclass(frozen=True)
class PassedBlock:
    """A block that every batch has passed: its nodes in graph order, what each batch's values were
    when it began, the value of its last node for each batch, and the same in the float model."""

    nodes: Sequence[fx.Node]
    starts: Sequence[Mapping[fx.Node, Any]]
    ends: Sequence[Tensor]
    float_ends: Sequence[Tensor]


BlockEnd = Callable[[PassedBlock], Chosen]
"""Called when all batches have passed a block, which runs again if this chooses values."""


@dataclass(frozen=True)
class ExpertPause:
    """A pause at a value that experts read.

    `call` gets the value of every batch, and what gives the rows `[tokens, k]` of every batch that
    experts would meet if all tokens went to them.
    """

    reroute: Reroute
    call: Callable[
        [Sequence[Tensor], Callable[[Sequence[int]], Mapping[int, list[Tensor]]]], Chosen
    ]


def sweep(
    gm: fx.GraphModule,
    batches: Sequence[dict[str, Tensor]],
    watch: set[fx.Node],
    observe: Observe,
    progress: Progress,
    reroutes: Sequence[AllTokens] = (),
    block_done: Callable[[], None] = lambda: None,
) -> None:
    """Call `observe(node, value)` for every watched node and batch; the `reroutes` show more.
    `block_done` is called when all batches have passed a block.

    All batches pass a block before the next block starts, so each weight is read once; what
    no watched node depends on is not run. Raises NumericsError for a weight or a watched value
    that is not finite.
    """
    run = _Sweep(gm, batches, progress, watch, observe, block_done)
    run.reroutes = {shown.reroute.last: shown for shown in reroutes}
    run.run(watch)


def solving_sweep(
    gm: fx.GraphModule,
    batches: Sequence[dict[str, Tensor]],
    pauses: Mapping[fx.Node, Pause | ExpertPause],
    progress: Progress,
    beside_float: bool = False,
    watch: Collection[fx.Node] = (),
    observe: Observe = lambda node, value: None,
    block_done: Callable[[], None] = lambda: None,
    block_ends: Mapping[fx.Node, BlockEnd] = MappingProxyType({}),
) -> None:
    """Stop at each of these values, in graph order, once it is computed for all batches.

    What a pause returns replaces the values of nodes that depend only on stored tensors, such as
    a dequantized weight; everything after it is computed with them. `beside_float` runs the float
    model along: quantize/dequantize pairs of the graph count as nothing there, and weights as they
    were before they were quantized. `observe(node, value)` is called for each batch of what is
    watched besides, and `block_done` when all have passed a block. `block_ends` has what is called
    behind blocks that end in these values. Raises as `sweep`.
    """

    def show(node: fx.Node, value: Tensor) -> None:
        if node not in pauses:
            observe(node, value)

    run = _Sweep(gm, batches, progress, {*pauses, *watch, *block_ends}, show, block_done)
    run.pauses = pauses
    run.block_ends = block_ends
    run.beside_float = beside_float
    run.run(run.watch)


@dataclass
class _Sweep:
    gm: fx.GraphModule
    batches: Sequence[dict[str, Tensor]]
    progress: Progress
    watch: set[fx.Node]
    observe: Observe
    block_done: Callable[[], None]
    pauses: Mapping[fx.Node, Pause | ExpertPause] = field(default_factory=dict)
    block_ends: Mapping[fx.Node, BlockEnd] = field(default_factory=dict)
    beside_float: bool = False
    reroutes: Mapping[fx.Node, AllTokens] = field(default_factory=dict)
    chosen: dict[fx.Node, Any] = field(default_factory=dict)
    constants: dict[fx.Node, Any] = field(default_factory=dict)
    float_constants: dict[fx.Node, Any] = field(default_factory=dict)
    done: set[fx.Node] = field(default_factory=set)
    held_bytes: dict[int, int] = field(default_factory=dict)

    def run(self, wanted: set[fx.Node]) -> None:
        needed = ancestors(wanted)
        inputs = [n for n in self.gm.graph.nodes if n.op == "placeholder" and n in needed]
        self.fixed = without_inputs(self.gm)
        steps = [[n for n in b if n in needed and n not in self.fixed] for b in blocks(self.gm)]
        steps = [step for step in steps if step]
        self.freed = last_uses([node for step in steps for node in step], unread=True)
        again = [shown.reroute for shown in self.reroutes.values()]
        again += [pause.reroute for pause in self.pauses.values() if isinstance(pause, ExpertPause)]
        for reroute in again:
            _keep(self.freed, reroute.reads(), reroute.last, [n for step in steps for n in step])
        environments: list[Values] = [
            {n: batch[str(n.target)] for n in inputs} for batch in self.batches
        ]
        floats = [dict(e) for e in environments] if self.beside_float else []
        with torch.no_grad():
            for node in inputs:
                if node in self.watch:
                    self._show(node, environments, floats)
            for done, step in enumerate(steps):
                self.progress("calibration sweep", done, len(steps))
                choose = self.block_ends.get(step[-1])
                starts = [] if choose is None else [dict(known) for known in environments]
                for segment in self._segments(step):
                    self._compute(segment, environments, floats)
                    if choose is not None and segment[-1] is step[-1]:
                        self._pass_again(step, choose, starts, environments, floats)
                    self._reached(segment[-1], environments, floats)
                self._end_block(step)
            self.progress("calibration sweep", len(steps), len(steps))

    def _segments(self, step: list[fx.Node]) -> list[list[fx.Node]]:
        """A block's nodes, split after every value at which the sweep pauses."""
        segments: list[list[fx.Node]] = [[]]
        for node in step:
            segments[-1].append(node)
            if node in self.pauses:
                segments.append([])
        return [segment for segment in segments if segment]

    def _compute(
        self, segment: list[fx.Node], environments: list[Values], floats: list[Values]
    ) -> None:
        """One segment for all batches; the values that are read for the last time are dropped."""
        for node in segment:
            for source in node.all_input_nodes:
                if source in self.fixed:
                    self._constant(source, self.constants)
        last = segment[-1]
        everyone = [*environments, *floats]
        for environment in environments:
            for node in segment:
                environment[node] = compute(self.gm, node, _Layered(environment, self.constants))
                if node in self.watch:
                    ensure_finite(label(node), environment[node], "activation")
                    self.observe(node, environment[node])
                if node in self.reroutes:
                    shown = self.reroutes[node]
                    known = _Layered(environment, self.constants)
                    for found in shown.reroute.rows(self.gm, known, shown.experts):
                        shown.observe(*found)
                if node is not last:
                    self._drop(node, environment)
            self._spill(environment, everyone)
        for environment in floats:
            for node in segment:
                environment[node] = self._float_value(node, environment)
                if node is not last:
                    self._drop(node, environment)
            self._spill(environment, everyone)

    def _reached(self, last: fx.Node, environments: list[Values], floats: list[Values]) -> None:
        """The end of a segment: the sweep may pause here, and drops what is read no more."""
        if last in self.pauses:
            self._show(last, environments, floats)
        for environment in (*environments, *floats):
            self._drop(last, environment)

    def _pass_again(
        self,
        step: list[fx.Node],
        choose: BlockEnd,
        starts: list[Values],
        environments: list[Values],
        floats: list[Values],
    ) -> None:
        """Run a block again from what entered it, if values are chosen at its end."""
        known = [_Layered(start, self.constants) for start in starts]
        ends, float_ends = ([e[step[-1]] for e in every] for every in (environments, floats))
        chosen = choose(PassedBlock(step, known, ends, float_ends))
        if not chosen:
            return
        self.chosen |= chosen
        self.constants.clear()
        for environment, start in zip(environments, starts, strict=True):
            environment.clear()
            environment |= start
            start.clear()
        self._compute(step, environments, [])

    def _show(self, node: fx.Node, environments: list[Values], floats: list[Values]) -> None:
        if node not in self.pauses:
            for environment in environments:
                ensure_finite(label(node), environment[node], "activation")
                self.observe(node, environment[node])
            return
        values = [environment[node] for environment in environments]
        pause = self.pauses[node]
        if isinstance(pause, ExpertPause):
            known = [_Layered(environment, self.constants) for environment in environments]
            self.chosen |= pause.call(values, partial(self._all_tokens, pause.reroute, known))
        else:
            self.chosen |= pause(values, [environment[node] for environment in floats])

    def _all_tokens(
        self, reroute: Reroute, known: Sequence[_Layered], experts: Sequence[int]
    ) -> dict[int, list[Tensor]]:
        """These experts' rows of every batch; in files, where they would take too much memory."""
        found: dict[int, dict[int, Tensor]] = {expert: {} for expert in experts}
        held = 0
        for batch, values in enumerate(known):
            for expert, _, rows in reroute.rows(self.gm, values, experts):
                found[expert][batch] = rows
                held += spill.held_bytes(rows)
            if held > spill.SPILL_BYTES:
                spill.to_files(found.values())
                held = 0
        return {expert: list(batches.values()) for expert, batches in found.items()}

    def _drop(self, node: fx.Node, environment: Values) -> None:
        for source in self.freed.get(node, ()):
            environment.pop(source, None)

    def _spill(self, changed: Values, everyone: Sequence[Values]) -> None:
        """Move the values of all batches to files where they take too much memory."""
        self.held_bytes[id(changed)] = sum(spill.held_bytes(v) for v in changed.values())
        if sum(self.held_bytes.values()) > spill.SPILL_BYTES:
            spill.to_files(everyone)
            self.held_bytes.clear()

    def _constant(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """The value of a node that no input reaches; computed once a block."""
        if node not in known:
            source = float_weight(node) if known is self.float_constants else None
            if source is not None:
                known[node] = self._constant(source, known)
            elif node in self.chosen and known is self.constants:
                known[node] = self.chosen[node]
            else:
                inputs = {n: self._constant(n, known) for n in node.all_input_nodes}
                known[node] = compute(self.gm, node, inputs)
                if node.op == "get_attr":
                    ensure_finite(label(node), known[node])
        return known[node]

    def _float_value(self, node: fx.Node, environment: Values) -> Any:
        """The node's value in the float model, where quantized values stand for themselves."""
        if is_quantization(node):
            return environment[operand(node, 0)]
        for source in node.all_input_nodes:
            if source in self.fixed:
                self._constant(source, self.float_constants)
        return compute(self.gm, node, _Layered(environment, self.float_constants))

    def _end_block(self, step: list[fx.Node]) -> None:
        self.block_done()
        self.constants.clear()
        self.float_constants.clear()
        return_free_pages()
        self.done.update(step)
        for node in [n for n in self.chosen if self.done.issuperset(n.users)]:
            del self.chosen[node]


def _keep(
    freed: dict[fx.Node, list[fx.Node]], values: set[fx.Node], until: fx.Node, order: list[fx.Node]
) -> None:
    """Let the values be freed after `until` instead of any node before it in `order`."""
    for node in order[: order.index(until)]:
        early = [value for value in freed.get(node, ()) if value in values]
        if early:
            freed[node] = [value for value in freed[node] if value not in values]
            freed.setdefault(until, []).extend(early)


class _Layered(Mapping[fx.Node, Any]):
    """Values of a batch before constants."""

    def __init__(self, first: Values, second: dict[fx.Node, Any]) -> None:
        self.first, self.second = first, second

    def __getitem__(self, node: fx.Node) -> Any:
        return self.first[node] if node in self.first else self.second[node]

    def __iter__(self) -> Iterator[fx.Node]:
        return iter({**self.second, **self.first})

    def __len__(self) -> int:
        return len({**self.second, **self.first})
