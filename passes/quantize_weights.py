"""Turn quantized weights into stored integer codes, with a search for the best clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from panguq.errors import RecipeError
from panguq.ir.edit import get_tensor, label, set_tensor
from panguq.ir.properties import Property
from panguq.passes.base import Pass, PassContext, PassResult, Table
from panguq.passes.stored_codes import store_codes
from panguq.passes.weight_scales import quantize_groups, search_scale

panguq = torch.ops.panguq


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Before: `quantize_weight(w, scale, zero_point)`.  After: integer codes read from storage.

    Round to nearest. `clip_search` first replaces the scales by those of least squared error
    over `steps` clip ratios from `smallest_ratio` to 1, each input weighted by the mean square of
    its activations (`importance: activations`, needs calibrate) or not (`none`). Codes of 8 bits
    are stored as int8 `[n, k]`, codes of 4 bits two to a byte, uint8 `[n, k / 2]`, others as
    `pack_codes` packs them.
    """

    name: ClassVar[str] = "quantize-weights"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.WEIGHT_CODES})
    clip_search: bool = False
    importance: Literal["activations", "none"] = "activations"
    smallest_ratio: float = 0.6
    steps: int = 9

    def __post_init__(self) -> None:
        if not 0.0 < self.smallest_ratio <= 1.0 or self.steps < 1:
            raise RecipeError(
                f"quantize-weights: smallest_ratio {self.smallest_ratio} must lie in (0, 1] and "
                f"steps {self.steps} be at least 1"
            )

    @property
    def needs_statistics(self) -> bool:
        """Whether the search weighs errors by calibration statistics."""
        return self.clip_search and self.importance == "activations"

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """Statistics of the inputs, if the search weighs errors by them."""
        return self.requires | ({Property.STATISTICS} if self.needs_statistics else set())

    def ratios(self) -> tuple[float, ...]:
        """The clip ratios of the search, 1 first."""
        if self.steps == 1:
            return (1.0,)
        return tuple(torch.linspace(1.0, self.smallest_ratio, self.steps).tolist())

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        rows = []
        nodes = [n for n in gm.graph.nodes if n.target is panguq.quantize_weight.default]
        for done, node in enumerate(nodes):
            ctx.progress("quantize weights", done, len(nodes))
            rows.append(self._quantize(gm, ctx, node))
            result.changed += 1
        ctx.progress("quantize weights", len(nodes), len(nodes))
        columns = ("weight", "bits", "group_size", "clipped_share", "weight_sqnr_db")
        result.tables["weights"] = Table(columns, tuple(rows))
        return result

    def _quantize(self, gm: fx.GraphModule, ctx: PassContext, node: fx.Node) -> tuple[object, ...]:
        stored, scale_node, zero_node, group_size, *_ = node.args
        dequantized = next(iter(node.users))
        matmul = next(iter(dequantized.users))
        spec = matmul.meta["scheme"].weight
        weight = get_tensor(gm, str(stored.target))
        scale = get_tensor(gm, str(scale_node.target))
        zero = None if zero_node is None else get_tensor(gm, str(zero_node.target))
        clipped = 0.0
        if self.clip_search:
            importance = None
            if self.needs_statistics:
                importance = matmul.meta["input_statistics"].mean_square
            plain = scale
            scale, zero = search_scale(weight, group_size, spec, importance, self.ratios())
            clipped = float((scale.abs() < plain).float().mean())
            set_tensor(gm, str(scale_node.target), ctx.store.put(scale))
            if zero is not None:
                set_tensor(gm, str(zero_node.target), ctx.store.put(zero))
        codes = panguq.quantize_weight(
            weight, scale, zero, group_size, spec.quant_min, spec.quant_max
        )
        groups = weight.float().reshape(weight.shape[0], -1, group_size)
        noise = (quantize_groups(groups, scale, zero, spec) - groups).square().sum()
        sqnr_db = 10 * torch.log10(groups.square().sum() / noise.clamp_min(1e-30))
        store_codes(node, ctx.store, codes, spec.bits)
        return label(matmul), spec.bits, group_size, clipped, float(sqnr_db)
