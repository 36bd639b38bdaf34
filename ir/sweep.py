"""Run calibration batches through a graph block by block, showing values to an observer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.blocks import blocks
from panguq.ir.edit import label
from panguq.ir.interpret import Environment, ancestors, compute, ensure_finite


def sweep(
    gm: fx.GraphModule,
    batches: Sequence[dict[str, Tensor]],
    watch: set[fx.Node],
    observe: Callable[[fx.Node, Tensor], None],
    progress: Callable[[str, int, int], None],
) -> None:
    """Call `observe(node, value)` for every watched node and batch.

    All batches pass a block before the next block starts, so each weight is read once; what
    no watched node depends on is not run. Raises NumericsError for a weight or a watched value
    that is not finite.
    """
    needed = ancestors(watch)
    steps = [[n for n in block if n in needed] for block in blocks(gm)]
    steps = [step for step in steps if step]
    freed = _last_uses_across(steps, watch)
    environments: list[Environment] = [
        {n: batch[str(n.target)] for n in needed if n.op == "placeholder"} for batch in batches
    ]
    with torch.no_grad():
        for environment in environments:
            for node in watch & environment.keys():
                ensure_finite(label(node), environment[node], "activation")
                observe(node, environment[node])
        for done, step in enumerate(steps):
            progress("calibration sweep", done, len(steps))
            weights: dict[fx.Node, Any] = {}
            for node in step:
                if node.op == "get_attr":
                    weights[node] = compute(gm, node, {})
                    ensure_finite(label(node), weights[node])
            for environment in environments:
                environment.update(weights)
                for node in step:
                    if node.op != "get_attr":
                        environment[node] = compute(gm, node, environment)
                    if node in watch:
                        ensure_finite(label(node), environment[node], "activation")
                        observe(node, environment[node])
                    for source in freed.get(node, ()):
                        environment.pop(source, None)
        progress("calibration sweep", len(steps), len(steps))


def _last_uses_across(
    steps: list[list[fx.Node]], watch: set[fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """What may be dropped after each node: values read for the last time, or never again."""
    last: dict[fx.Node, fx.Node] = {}
    for step in steps:
        for node in step:
            if node.op == "get_attr":
                continue
            last.setdefault(node, node)
            for source in node.all_input_nodes:
                last[source] = node
    freed: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        freed.setdefault(node, []).append(source)
    return freed
