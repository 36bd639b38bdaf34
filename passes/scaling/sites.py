"""The frame of the passes that choose a scale for every site of the channel analysis."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, fx

from panguq.errors import InputError
from panguq.ir.analysis.channels import KINDS, ScaleSite
from panguq.ir.edit import label
from panguq.ir.properties import Property
from panguq.ir.run.interpret import ensure_finite
from panguq.ir.run.sweep import solving_sweep
from panguq.ir.views import Linear
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Table
from panguq.passes.scaling.folding import (
    Factors,
    add_factors,
    check_kinds,
    choose_sites,
    fold,
    regions,
    storable_factors,
)
from panguq.passes.scaling.search import SeenInput, look_at
from panguq.passes.scaling.seen_behind import SeenBehind
from panguq.ranks import ranks
from panguq.tensors.work_folder import Finished

REASON = "reason"


def chosen(scale: Tensor, **row: str | int | float) -> Finished:
    """A site's scale `[channels]`, and its row of the table by column."""
    return Finished({"scale": scale}, row)


def left_alone(reason: str) -> Finished:
    """No scale, and why."""
    return Finished({}, {REASON: reason})


@dataclass(frozen=True)
class ScaleSites(Pass):
    """Before: x / 1 ─► linear(W).  After: x / s ─► linear(W · s); same function, no new node.

    One sweep of the float model: a site's scale is chosen once all that its linears read is known,
    in graph order, from the weights as the sites before left them. A compile that was killed
    chooses none twice.
    """

    requires: ClassVar[frozenset[Property]] = frozenset(
        {Property.CANONICAL, Property.SCHEMES, Property.FLOAT_MATMULS}
    )
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.STATISTICS, Property.CALIBRATED})
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    divided: ClassVar[bool] = True
    sites: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        check_kinds(self.name, self.sites)

    def refuse(self, site: ScaleSite) -> str | None:
        """Why this site is not wanted, if so."""
        raise NotImplementedError

    def choose(
        self,
        gm: fx.GraphModule,
        site: ScaleSite,
        seen: Mapping[fx.Node, SeenInput],
        factors: Factors,
    ) -> Finished:
        """`chosen` or `left_alone`; `factors` are those of the sites before. All ranks call it with
        the same arguments; they divide what asks `SiteError.of_all`."""
        raise NotImplementedError

    def columns(self) -> tuple[str, ...]:
        """Those of the table that `choose` fills."""
        raise NotImplementedError

    def samples(self) -> bool:
        """Whether `choose` looks at tokens, and not only at statistics."""
        return True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        sites = choose_sites(gm, ctx, result, self.sites, self.refuse)
        factors: Factors = {}
        scales: dict[ScaleSite, Tensor] = {}
        rows: list[tuple[object, ...]] = []

        def decide(site: ScaleSite, seen: Mapping[fx.Node, SeenInput]) -> None:
            unit = f"{site.kind} {site.name}"
            done = ctx.together(unit, lambda: self.choose(gm, site, seen, factors))
            if REASON in done.facts:
                result.skip(site.source, str(done.facts[REASON]))
                return
            scales[site] = storable_factors(gm, site, done.tensors["scale"])
            add_factors(site, scales[site], factors)
            row = (done.facts[column] for column in self.columns())
            rows.append((site.name, site.kind, site.channels, *row))

        if sites:
            behind = SeenBehind.wanted(gm, ctx, sites)
            _visit(gm, ctx, sites, decide, self.samples(), scales, behind)
            fold(gm, ctx, factors, self.name)
            ctx.statistics = None if behind is None else behind.found()
            result.changed = len(scales)
            result.sites = regions(gm, list(scales))
            columns = ("site", "kind", "channels", *self.columns())
            result.tables["scales"] = Table(columns, tuple(rows))
        return result


def _visit(
    gm: fx.GraphModule,
    ctx: PassContext,
    sites: Sequence[ScaleSite],
    decide: Callable[[ScaleSite, Mapping[fx.Node, SeenInput]], None],
    samples: bool,
    scales: Mapping[ScaleSite, Tensor],
    behind: SeenBehind | None,
) -> None:
    """Call `decide(site, seen)` for each site when all that its linears read has been seen.

    `scales` are those of the sites that were decided so far, with which `behind` sees the values.

    Raises InputError where there are no calibration tokens, NumericsError for values that are not
    finite.
    """
    waiting = {site: {Linear.of(c.linear).input for c in site.consumers} for site in sites}
    readers: dict[fx.Node, list[ScaleSite]] = defaultdict(list)
    for site, inputs in waiting.items():
        for value in inputs:
            readers[value].append(site)
    seen: dict[fx.Node, SeenInput] = {}

    def pause(
        node: fx.Node, values: Sequence[Tensor], _: Sequence[Tensor]
    ) -> Mapping[fx.Node, Tensor]:
        for value in values:
            ensure_finite(label(node), value, "activation")
        tokens = sum(value.shape[:-1].numel() for value in values)
        if not sum(ranks().exchange(tokens)):
            raise InputError("there are no calibration tokens", "give calibration data")
        linears = [c.linear for site in readers[node] for c in site.consumers]
        linears = [linear for linear in linears if Linear.of(linear).input is node]
        seen[node] = look_at(values, linears, ctx.generator(), samples)
        for site in readers[node]:
            waiting[site].discard(node)
            if not waiting[site]:
                decide(site, seen)
        if behind is not None:
            behind.complete &= not any(waiting[site] for site in readers[node])
            behind.add_divided(node, values, scales)
        for done in [v for v in seen if not any(waiting[site] for site in readers[v])]:
            del seen[done]
        return {}

    pauses = {n: partial(pause, n) for n in readers}
    batches = ranks().share(ctx.batches)
    if behind is None:
        solving_sweep(gm, batches, pauses, ctx.progress)
        return
    watch = [value for value in behind.statistics if value not in readers]
    solving_sweep(
        gm,
        batches,
        pauses,
        ctx.progress,
        watch=watch,
        observe=behind.add,
        block_done=behind.block_done,
    )
