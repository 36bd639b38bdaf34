"""Turn quantized weights into stored codes, with a search for the best clipping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, fx

from panguq.decibels import decibels
from panguq.ir.edit import get_tensor, label, set_tensor
from panguq.ir.node_meta import statistics_of, weight_spec_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.views import ExpertLinear, QuantizedWeight, matmul_of
from panguq.passes.codes.stored_codes import codes_name, packed_codes, read_packed
from panguq.passes.codes.weight_scales import (
    check_clip_search,
    clip_ratios,
    quantize_groups,
    search_scale,
    weight_codes,
)
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Table
from panguq.ranks import ranks
from panguq.tensors.folded_weight import materialized
from panguq.tensors.nameless import roomy_empty
from panguq.tensors.row_slices import row_slices
from panguq.tensors.weight_store import Unit
from panguq.tensors.work_folder import Finished

AT_ONCE = 8  # weights for each rank between two times that they tell one another


class Rounded(NamedTuple):
    """Codes `[n, k]`, scales and zero points `[n, groups]`, and how good they are."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    clipped: float
    sqnr_db: float


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Before: `quantize_weight(w, scale, zero_point)`.  After: codes read from storage.

    Round to nearest. `clip_search` first replaces the scales by those of least squared error
    over `steps` clip ratios from `smallest_ratio` to 1, each input weighted by the mean square of
    its activations (`importance: activations`, needs calibrate) or not (`none`). Codes of 8 bits
    are stored as they are, `[n, k]`, codes of 4 bits two to a byte, uint8 `[n, k / 2]`, others as
    `pack_codes` packs them.
    """

    name: ClassVar[str] = "quantize-weights"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ, Property.UNSOLVED})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.WEIGHT_CODES})
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.UNSOLVED})
    clip_search: bool = False
    importance: Literal["activations", "none"] = "activations"
    smallest_ratio: float = 0.6
    steps: int = 9

    def __post_init__(self) -> None:
        check_clip_search(self.name, self.smallest_ratio, self.steps)

    @property
    def needs_statistics(self) -> bool:
        """Whether the search weighs errors by calibration statistics."""
        return self.clip_search and self.importance == "activations"

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """Statistics of the inputs, if the search weighs errors by them."""
        return self.requires | ({Property.STATISTICS} if self.needs_statistics else set())

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        rows = []
        nodes = [n for n in gm.graph.nodes if QuantizedWeight.match(n) is not None]
        at_once = AT_ONCE * ranks().count
        for start in range(0, len(nodes), at_once):
            ctx.progress("quantize weights", start, len(nodes))
            some = nodes[start : start + at_once]
            units = [self._unit(gm, node) for node in some]
            for node, done in zip(some, ctx.each(units), strict=True):
                rows.append(_store(gm, node, done))
                result.changed += 1
        ctx.progress("quantize weights", len(nodes), len(nodes))
        columns = ("weight", "bits", "group_size", "clipped_share", "weight_sqnr_db")
        result.tables["weights"] = Table(columns, tuple(rows))
        return result

    def _unit(self, gm: fx.GraphModule, node: fx.Node) -> Unit:
        quantizer, matmul = QuantizedWeight.of(node), matmul_of(node)
        spec = weight_spec_of(matmul)
        scale_name, zero_name = _grid_names(quantizer)
        importance = None
        if self.needs_statistics:
            importance = statistics_of(matmul).mean_square
            experts = ExpertLinear.match(matmul)
            if experts is not None:
                importance = importance[list(experts.each)]

        def compute() -> Finished:
            weight = materialized(get_tensor(gm, quantizer.weight_name))
            scale = get_tensor(gm, scale_name)
            zero = None if zero_name is None else get_tensor(gm, zero_name)
            found = self._codes(weight, scale, zero, quantizer.group_size, spec, importance)
            tensors = {codes_name(node): packed_codes(found.codes, spec.bits)}
            if self.clip_search:
                tensors[scale_name] = found.scale
                if zero_name is not None and found.zero_point is not None:
                    tensors[zero_name] = found.zero_point
            return Finished(tensors, {"clipped": found.clipped, "sqnr_db": found.sqnr_db})

        weights = quantizer.weight.meta["val"].numel()
        return Unit(codes_name(node), weights, compute)

    def _codes(
        self,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        group_size: int,
        spec: QuantSpec,
        importance: Tensor | None,
    ) -> Rounded:
        """A weight `[n, k]`, or those of all experts, rounded a few rows at a time: its float
        copies would be large."""
        codes = roomy_empty(weight.shape, spec.format.storage)
        steps, zeros = torch.empty_like(scale), None if zero is None else torch.empty_like(zero)
        clipped, signal, noise = 0, 0.0, 0.0
        for rows in _rows_of_all(weight):
            some = weight[rows]
            plain = step = scale[rows]
            offset = None if zero is None else zero[rows]
            if self.clip_search:
                ratios = clip_ratios(self.smallest_ratio, self.steps)
                meets = importance
                if importance is not None and importance.dim() == 2:  # each expert's
                    meets = importance[rows[0]]
                step, offset = search_scale(some, group_size, spec, meets, ratios)
            codes[rows] = weight_codes(some, step, offset, group_size, spec)
            groups = some.float().reshape(len(some), -1, group_size)
            error = quantize_groups(groups, step, offset, spec).sub_(groups)
            noise += float(error.square_().sum())
            signal += float(groups.square().sum())  # may be the weight itself
            clipped += int((step.abs() < plain).sum())
            steps[rows] = step
            if zeros is not None and offset is not None:
                zeros[rows] = offset
        sqnr_db = decibels(signal / max(noise, 1e-30))
        share = clipped / max(scale.numel(), 1)
        return Rounded(codes, steps, zeros, share, sqnr_db)


def _store(gm: fx.GraphModule, node: fx.Node, done: Finished) -> tuple[object, ...]:
    """Let the matmul read the codes that were made; returns its row of the table."""
    quantizer, matmul = QuantizedWeight.of(node), matmul_of(node)
    for name in _grid_names(quantizer):
        if name is not None and name in done.tensors:
            set_tensor(gm, name, done.tensors[name])
    bits = weight_spec_of(matmul).bits
    read_packed(node, done.tensors[codes_name(node)], bits)
    facts = (done.facts["clipped"], done.facts["sqnr_db"])
    return label(matmul), bits, quantizer.group_size, *facts


def _grid_names(quantizer: QuantizedWeight) -> tuple[str, str | None]:
    """The names of the stored scale and zero point."""
    zero = quantizer.zero_point
    return str(quantizer.scale.target), None if zero is None else str(zero.target)


def _rows_of_all(weight: Tensor) -> Iterator[tuple[Any, ...]]:
    """Indices of a few rows of a weight `[n, k]`, or of one expert's in `[experts, n, k]`."""
    if weight.dim() == 2:
        yield from ((rows,) for rows in row_slices(weight))
    else:
        yield from ((e, rows) for e in range(len(weight)) for rows in row_slices(weight[e]))
