"""Treat matmul inputs that a static per-tensor range serves badly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.edit import call, free_name, get_tensor, label, split, tensor_node
from panguq.ir.node_meta import annotate, meta_of, range_of, scheme_of, statistics_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.views import ExpertLinear, Linear, by_input
from panguq.passes.pipeline.base import (
    Pass,
    PassContext,
    PassResult,
    Region,
    Table,
    linears,
    matmuls,
)
from panguq.passes.statistics.input_values import static_spec
from panguq.passes.statistics.observers import range_sqnr_db

aten = torch.ops.aten


@dataclass(frozen=True)
class Outliers(Pass):
    """Before: `y = linear(x, w)`, x to be quantized.  After, by `treatment`:

    - `split`: `y = linear(x, w') + linear(x[..., S], w[:, S])`. S are the channels of x whose amax
      over all tokens exceeds `threshold` times the range that calibration chose; w' is w with the
      columns S zero. The second matmul stays float, so a massive channel costs a few columns.
    - `per-token`: the matmul's activation is quantized per token (W8A8_DYNAMIC).
    - `float`: the matmul is not quantized.
    - `clip`: nothing changes; what exceeds the range is clipped, and the table says by how much.

    `per-token` and `float` take the inputs of lowest static SQNR first, those below `floor_db`,
    until `max_share` of all weights to be quantized would be exceeded (columns that `split` took
    count). Matmuls that read one tensor are treated alike, so all experts of one are; nothing is
    split off what experts read.
    """

    name: ClassVar[str] = "outliers"
    requires: ClassVar[frozenset[Property]] = frozenset(
        {Property.SCHEMES, Property.STATISTICS, Property.FLOAT_MATMULS}
    )
    exact: ClassVar[bool] = True
    treatment: Literal["split", "per-token", "float", "clip"] = "split"
    threshold: float = 2.0
    floor_db: float = 40.0
    max_share: float = 0.1

    def __post_init__(self) -> None:
        if self.threshold < 1.0 or not 0.0 <= self.max_share <= 1.0:
            raise RecipeError(
                f"outliers: threshold {self.threshold} must be at least 1 and max_share "
                f"{self.max_share} lie in [0, 1]"
            )

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        readers = by_input(n for n in matmuls(gm) if scheme_of(n).activation is not None)
        if self.treatment == "split":
            return self._split(gm, ctx, readers)
        return self._reassign(gm, readers)

    def _split(
        self, gm: fx.GraphModule, ctx: PassContext, readers: dict[fx.Node, list[fx.Node]]
    ) -> PassResult:
        result = PassResult()
        rows: list[tuple[object, ...]] = []
        for value, nodes in readers.items():
            seen = statistics_of(nodes[0])
            bound = self._bound(nodes)
            channels = (seen.channel_amax > self.threshold * bound).nonzero().flatten()
            if not len(channels):
                continue
            if ExpertLinear.match(nodes[0]) is not None:
                result.skip(value, "experts read it, whose side matmuls no kernel takes together")
                continue
            if len(channels) > seen.channel_amax.numel() // 8:
                result.skip(
                    value, f"{len(channels)} outlier channels are too many for a side matmul"
                )
                continue
            for node in nodes:
                result.sites.append(Region((label(value),), (label(node),)))
                _split_channels(gm, ctx, node, channels)
                result.changed += 1
            listed = " ".join(str(c) for c in channels.tolist())
            amax = f"{float(seen.channel_amax.max()):.6g}"
            rows.append((label(value), len(channels), amax, f"{bound:.6g}", listed))
        columns = ("value", "channels", "amax", "range", "which")
        result.tables["split"] = Table(columns, tuple(rows))
        return result

    def _bound(self, nodes: list[fx.Node]) -> float:
        """The largest magnitude that stays unclipped, or that plain tokens reach."""
        observed = meta_of(nodes[0]).input_range
        if observed is not None:
            return max(-observed[0], observed[1])
        return float(statistics_of(nodes[0]).plain_amax.max())

    def _reassign(self, gm: fx.GraphModule, readers: dict[fx.Node, list[fx.Node]]) -> PassResult:
        result = PassResult()
        rows: list[tuple[object, ...]] = []
        ranked = []
        for value, nodes in readers.items():
            spec = static_spec(nodes)
            if spec is not None:
                histogram = statistics_of(nodes[0]).histogram
                low, high = range_of(nodes[0])
                quality = range_sqnr_db(histogram, low, high, spec)
                ranked.append((quality, value, nodes))
        ranked.sort(key=lambda entry: entry[0])
        quantized = [n for n in matmuls(gm) if not scheme_of(n).is_float]
        total = sum(_weights(n) for n in quantized)
        spent = sum(_weights(n) for n in linears(gm) if meta_of(n).split_from) / max(total, 1)
        for quality, value, nodes in ranked:
            share = sum(_weights(n) for n in nodes) / total
            if quality >= self.floor_db:
                continue
            if self.treatment != "clip" and spent + share > self.max_share:
                result.skip(value, f"{quality:.1f} dB, but max_share {self.max_share:g} is spent")
                continue
            if self.treatment != "clip":
                spent += share
                scheme = SCHEMES["FLOAT" if self.treatment == "float" else "W8A8_DYNAMIC"]
                for node in nodes:
                    annotate(node, scheme=scheme)
                    result.changed += 1
            rows.append((label(value), f"{quality:.1f}", self.treatment, f"{share:.4f}"))
        columns = ("value", "input_sqnr_db", "treatment", "weight_share")
        result.tables["treated"] = Table(columns, tuple(rows))
        return result


def _weights(node: fx.Node) -> int:
    return int(Linear.of(node).weight.meta["val"].numel())


def _split_channels(gm: fx.GraphModule, ctx: PassContext, node: fx.Node, channels: Tensor) -> None:
    """Replace `node` by itself without these input channels plus a float matmul of them."""
    matmul = Linear.of(node)
    value, name = matmul.input, matmul.weight_name
    weight = get_tensor(gm, name)
    rest = weight.clone()
    rest[:, channels] = 0
    side_name = free_name(gm, f"{name}_outliers")  # another reader of the weight may have one
    rest_name = side_name.replace("_outliers", "_without_outliers")
    rest_node = tensor_node(node, rest_name, ctx.store.put(rest))
    side = tensor_node(node, side_name, ctx.store.put(weight[:, channels]))
    which = tensor_node(node, side_name.replace("_outliers", "_outlier_channels"), channels)
    linear, select = aten.linear.default, aten.index_select.default
    few = call(node, select, (value, -1, which), origin=node, suffix=".outlier_input")
    side_node = call(node, linear, (few, side), origin=node, suffix=".outliers")
    rest_operands = matmul.operands_with(rest_node)
    main = call(node, linear, rest_operands, origin=node, suffix=".main")
    total = call(node, aten.add.Tensor, (main, side_node), origin=node)
    annotate(side_node, scheme=SCHEMES["FLOAT"])
    split(node, main, side_node, total)
