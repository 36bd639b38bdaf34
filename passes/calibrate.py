"""Observe every matmul's input over the calibration batches and choose static ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.edit import label
from panguq.ir.input_statistics import InputStatistics, fill_state, state_of
from panguq.ir.node_meta import annotate, is_quantized
from panguq.ir.properties import Property
from panguq.ir.run.sweep import sweep
from panguq.ir.views import ExpertLinear, by_input
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Table, matmuls
from panguq.passes.statistics.expert_tokens import (
    FEW_TOKENS,
    count_tokens,
    reroutes,
    routing_values,
    tokens_table,
)
from panguq.passes.statistics.in_order import InOrder
from panguq.passes.statistics.input_values import static_spec, statistics_for
from panguq.passes.statistics.observers import OBSERVERS, range_sqnr_db
from panguq.ranks import ranks
from panguq.tensors.work_folder import Finished


@dataclass(frozen=True)
class Calibrate(Pass):
    """Before: linears with schemes.  After: the same, each knowing what its input looks like.

    NodeMeta has `input_statistics` for every matmul that is to be quantized; `input_range`,
    (low, high) as the observer chose it, for those with a static activation.
    `observer`: `minmax`; `percentile` of all values; `mse`, the clipped range of least mean
    squared error; `histogram`, the clipped range of least KL divergence. All look at plain tokens
    only (see `InputStatistics`), and count each channel by the weights that it meets.
    What the pass before has left of its own sweep (`ctx.statistics`) is taken in place of another.
    Experts that fewer than `least_tokens` calibration tokens reach see all of them instead; what
    their gates give is as it was. 0 follows the router alone.
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[Property]] = frozenset(
        {Property.CANONICAL, Property.SCHEMES, Property.FLOAT_MATMULS}
    )
    establishes: ClassVar[frozenset[Property]] = frozenset(
        {Property.CALIBRATED, Property.STATISTICS}
    )
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    divided: ClassVar[bool] = True
    observer: Literal["minmax", "percentile", "mse", "histogram"] = "minmax"
    percentile: float = 99.999
    least_tokens: int = FEW_TOKENS

    def __post_init__(self) -> None:
        if not 50.0 < self.percentile <= 100.0:
            raise RecipeError(f"calibrate: percentile {self.percentile} must lie in (50, 100]")

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        readers = by_input(filter(is_quantized, matmuls(gm)))
        if readers:
            ctx.require_batches()
        statistics = {value: statistics_for(gm, value, nodes) for value, nodes in readers.items()}
        tokens = count_tokens(gm, ctx, filter(is_quantized, matmuls(gm)), self.least_tokens)
        counts = {ExpertLinear.of(node).counts for node in tokens}
        seen = InOrder(statistics)
        latest: dict[fx.Node, list[int]] = {}
        unfed = {node: set(of.underfed) for node, of in tokens.items()}

        def observe(node: fx.Node, value: Tensor) -> None:
            if node in counts:
                latest[node] = value.tolist()
                return
            if node not in statistics:  # a router's weights, which the sweep looks at
                return
            seen.add(node, value)
            expert_linear = next((n for n in readers[node] if n in tokens), None)
            if expert_linear is None:
                return
            found = value.split(latest[ExpertLinear.of(expert_linear).counts])
            for expert, rows in enumerate(found):
                if len(rows) and expert not in unfed[expert_linear]:
                    seen.add_of_expert(node, expert, rows)

        def observe_all(expert: int, node: fx.Node, rows: Tensor) -> None:
            seen.add_of_expert(node, expert, rows)

        left = ctx.statistics or {}

        def compute() -> Finished:
            if all(label(value) in left for value in statistics):
                return _finished({label(value): left[label(value)] for value in statistics})
            watched = {*readers, *counts, *(routing_values(gm) if tokens else ())}
            again = reroutes(tokens, observe_all)
            batches = ranks().share(ctx.batches)
            sweep(gm, batches, watched, observe, ctx.progress, again, seen.block_done)
            seen.block_done()  # of a graph without blocks
            return _finished({label(value): found for value, found in statistics.items()})

        observed = ctx.together("statistics", compute).tensors
        for value, found in statistics.items():
            fill_state(found, observed, label(value))
        result = self._conclude(readers, statistics)
        if tokens:
            result.tables["experts"] = tokens_table(tokens)
        return result

    def _conclude(
        self,
        readers: dict[fx.Node, list[fx.Node]],
        statistics: dict[fx.Node, InputStatistics],
    ) -> PassResult:
        result = PassResult()
        rows: list[tuple[object, ...]] = []
        for value, nodes in readers.items():
            seen, spec = statistics[value], static_spec(nodes)
            low = high = quality = ""
            for node in nodes:
                annotate(node, input_statistics=seen)
            if spec is not None:
                chosen = OBSERVERS[self.observer](seen.histogram, spec, self.percentile)
                low, high = (f"{bound:.6g}" for bound in chosen)
                quality = f"{range_sqnr_db(seen.histogram, *chosen, spec):.1f}"
                for node in nodes:
                    annotate(node, input_range=chosen)
            result.changed += len(nodes)
            massive = seen.tokens - seen.plain_tokens
            amax = f"{float(seen.channel_amax.max()):.6g}"
            plain = f"{float(seen.plain_amax.max()):.6g}"
            ratio = f"{seen.channel_ratio:.1f}"
            rows.append((label(value), len(nodes), amax, plain, massive, ratio, low, high, quality))
        seen_columns = ("value", "readers", "amax", "plain_amax", "massive_tokens", "channel_ratio")
        columns = (*seen_columns, "low", "high", "input_sqnr_db")
        result.tables["ranges"] = Table(columns, tuple(rows))
        return result


def _finished(statistics: Mapping[str, InputStatistics]) -> Finished:
    states = (state_of(seen, name) for name, seen in statistics.items())
    return Finished({name: tensor for state in states for name, tensor in state.items()})
