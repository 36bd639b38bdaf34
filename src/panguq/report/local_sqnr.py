"""How well each matmul does on its own: fed the float model's input, in dB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.decibels import sqnr_db
from panguq.ir.edit import ancestors, label
from panguq.ir.run import interpret
from panguq.ir.views import Linear
from panguq.passes.pipeline.base import linears


@dataclass(frozen=True)
class MatmulReference:
    """A matmul of the float graph on the probe: its input's label and value, and its output."""

    input_label: str
    input: Tensor
    output: Tensor


def matmul_references(
    gm: fx.GraphModule, probe: Mapping[str, Tensor]
) -> dict[str, MatmulReference]:
    """Input and output of every matmul of a float graph on the probe, by the matmul's label."""
    matmuls = linears(gm)
    inputs = {node: Linear.of(node).input for node in matmuls}
    values = interpret.values(gm, probe, {*inputs, *inputs.values()})
    return {
        label(node): MatmulReference(label(x), values[x], values[node])
        for node, x in inputs.items()
    }


def local_sqnr(gm: fx.GraphModule, references: Mapping[str, MatmulReference]) -> dict[str, float]:
    """SQNR in dB of each referenced matmul of `gm`, computed from the reference's input.

    A matmul whose input or output is not found under its label any more is left out.
    """
    nodes = {label(n): n for n in gm.graph.nodes}
    result = {}
    for name, reference in references.items():
        start, end = nodes.get(reference.input_label), nodes.get(name)
        if start is None or end is None:
            continue
        result[name] = sqnr_db(reference.output, _region(gm, start, end, reference.input))
    return result


def _region(gm: fx.GraphModule, start: fx.Node, end: fx.Node, value: Tensor) -> Tensor:
    needed = ancestors([end], stop=[start])
    environment: interpret.Values = {start: value}
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node in needed and node is not start:
                environment[node] = interpret.compute(gm, node, environment)
    return environment[end]
