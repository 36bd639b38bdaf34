"""What matmuls will read once scales are folded, seen in the sweep that chooses the scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.ir.analysis.channels import ScaleSite
from panguq.ir.edit import label
from panguq.ir.input_statistics import InputStatistics
from panguq.ir.node_meta import is_quantized
from panguq.ir.properties import Property
from panguq.ir.views import ExpertLinear, Linear, by_input
from panguq.passes.pipeline.base import PassContext, matmuls
from panguq.passes.statistics.in_order import InOrder
from panguq.passes.statistics.input_values import static_spec, statistics_for


@dataclass
class SeenBehind:
    """Statistics of every value that quantized matmuls read, as it is behind the sites.

    Folding divides a site's values by its scale and changes no other, so that a sweep of its own
    would see the same, up to the rounding of float32.
    """

    statistics: dict[fx.Node, InputStatistics]
    complete: bool = True

    def __post_init__(self) -> None:
        self._seen = InOrder(self.statistics)

    @classmethod
    def wanted(
        cls, gm: fx.GraphModule, ctx: PassContext, sites: Sequence[ScaleSite]
    ) -> SeenBehind | None:
        """Empty ones; None where the next pass wants none, or where a sweep of its own sees more.

        Experts are shown tokens that their router did not send, and where a site scales rows of a
        linear, what an error in its inputs costs is known only once later scales are, too.
        """
        if ctx.following is None or Property.STATISTICS not in ctx.following.establishes:
            return None
        readers = by_input(filter(is_quantized, matmuls(gm)))
        nodes = [node for some in readers.values() for node in some]
        if any(ExpertLinear.match(node) is not None for node in nodes):
            return None
        rows = {edit.weight for site in sites for edit in site.edits if edit.axis == 0}
        scaled = [node for node in nodes if Linear.of(node).weight_name in rows]
        if scaled and any(static_spec(some) is not None for some in readers.values()):
            return None
        return cls({value: statistics_for(gm, value, some) for value, some in readers.items()})

    def add(self, node: fx.Node, value: Tensor) -> None:
        """Observe one batch of a value `[..., k]` that no site divides."""
        self._seen.add(node, value)

    def add_divided(
        self, node: fx.Node, values: Sequence[Tensor], scales: Mapping[ScaleSite, Tensor]
    ) -> None:
        """Observe all batches of a value that sites divide by the `[channels]` of `scales`."""
        if node not in self.statistics:  # none of its readers is quantized
            return
        by = torch.ones(values[0].shape[-1], dtype=torch.float64)
        for site, scale in scales.items():
            for consumer in site.consumers:
                if Linear.of(consumer.linear).input is node:
                    channel = consumer.channel
                    by = torch.where(channel < 0, 1.0, scale[channel.clamp_min(0)])
        seen, divisor = self.statistics[node], by.float()
        if seen.column_energy is not None:
            seen.column_energy = seen.column_energy * divisor.square()
        for value in values:
            self._seen.add(node, value.float() / divisor)

    def block_done(self) -> None:
        """All batches have passed a block."""
        self._seen.block_done()

    def found(self) -> Mapping[str, InputStatistics] | None:
        """By label of the value; None where something could not be seen."""
        return {label(v): seen for v, seen in self.statistics.items()} if self.complete else None
