"""How well each matmul does on its own: fed the float model's input, in dB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.decibels import sqnr_db
from panguq.ir.canonical_views import Kronecker
from panguq.ir.edit import ancestors, label
from panguq.ir.run import interpret
from panguq.ir.views import ExpertLinear, Linear
from panguq.passes.pipeline.base import matmuls


@dataclass(frozen=True)
class MatmulReference:
    """A matmul of the float graph on the probe: what it reads, by label, and its output.

    That is its input, and of experts' matmuls also how many rows each expert has.
    """

    given: Mapping[str, Tensor]
    output: Tensor


def matmul_references(
    gm: fx.GraphModule, probe: Mapping[str, Tensor]
) -> dict[str, MatmulReference]:
    """Input and output of every matmul of a float graph on the probe, by the matmul's label."""
    reads = {node: _reads(node) for node in matmuls(gm)}
    values = interpret.values(gm, probe, {*reads, *(x for read in reads.values() for x in read)})
    return {
        label(node): MatmulReference({label(x): values[x] for x in read}, values[node])
        for node, read in reads.items()
    }


def _reads(node: fx.Node) -> list[fx.Node]:
    """What the matmul reads; in front of a Kronecker product, which kernels join with it."""
    experts, x = ExpertLinear.match(node), Linear.of(node).input
    turned = Kronecker.match(x)
    x = x if turned is None else turned.x
    return [x, *(() if experts is None else (experts.counts,))]


def local_sqnr(gm: fx.GraphModule, references: Mapping[str, MatmulReference]) -> dict[str, float]:
    """SQNR in dB of each referenced matmul of `gm`, computed from the reference's input.

    A matmul whose input or output is not found under its label any more is left out.
    """
    nodes = {label(n): n for n in gm.graph.nodes}
    result = {}
    for name, reference in references.items():
        end = nodes.get(name)
        given = {nodes.get(read): value for read, value in reference.given.items()}
        if end is None or None in given:
            continue
        starts = {node: value for node, value in given.items() if node is not None}
        result[name] = sqnr_db(reference.output, _region(gm, starts, end))
    return result


def _region(gm: fx.GraphModule, starts: Mapping[fx.Node, Tensor], end: fx.Node) -> Tensor:
    needed = ancestors([end], stop=starts)
    environment: interpret.Values = dict(starts)
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node in needed and node not in starts:
                environment[node] = interpret.compute(gm, node, environment)
    return environment[end]
