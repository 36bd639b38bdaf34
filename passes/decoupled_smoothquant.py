"""SmoothQuant with an exponent for activations and one for weights, by the error of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.decibels import decibels
from panguq.errors import RecipeError
from panguq.ir.analysis.channels import KINDS, ScaleSite
from panguq.ir.input_statistics import plain_tokens
from panguq.ir.node_meta import is_quantized, scheme_of, weight_spec_of
from panguq.ir.properties import Property
from panguq.ir.run.interpret import Values
from panguq.ir.views import ExpertLinear, Linear, by_input
from panguq.passes.codes.weight_scales import min_max_scale, quantize_groups
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
from panguq.passes.scaling.search import quantized_input
from panguq.passes.transforms.blocks import (
    Piece,
    RoundedLinear,
    TwoRuns,
    pieces_of,
    run_piece,
    token_errors,
)
from panguq.tensors.work_folder import Finished

SMALLEST = 1e-5
COARSE = tuple(step / 5 for step in range(6))
FINE = (-0.2, -0.1, 0.1, 0.2)
Exponents = tuple[float, float]
OFF: Exponents = (0.0, 0.0)  # s = 1


@dataclass(frozen=True)
class DecoupledSmoothQuant(Pass):
    """Before: x / 1 ─► linear(W).  After: x / s ─► linear(W · s); same function, no new node.

    As smoothquant, with s_j = a_j^p / w_j^q: a_j is the largest |x_j| over plain tokens, w_j the
    largest weight that it meets, and p and q are chosen apart for each site. They are those of
    least error of the site's *block* (`ir/analysis/blocks.py`, half a decoder layer): all of its
    matmuls quantized under their schemes, fed by the float model, on `batches` of the calibration
    data; the squared error of each token over its square, in the mean.

    1. q = 1 - p for p = 0, 0.2 … 1, and s = 1;
    2. p alone, then q alone, by ±0.1 and ±0.2 around the best.

    A site is searched with the scales that the block's others have by then, and all of them again
    until none changes, `rounds` times at most: so up_proj's two sides, the norm's scale in front of
    it and the one that its rows divide by for down_proj, settle together.

    The recipe of openPangu-2.0's W8A8 models; SmoothQuant: Xiao et al., arXiv 2211.10438.
    """

    name: ClassVar[str] = "decoupled-smoothquant"
    requires: ClassVar[frozenset[Property]] = frozenset(
        {Property.CANONICAL, Property.SCHEMES, Property.FLOAT_MATMULS}
    )
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.STATISTICS, Property.CALIBRATED})
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    sites: tuple[str, ...] = KINDS
    batches: int = 2
    rounds: int = 2

    def __post_init__(self) -> None:
        check_kinds(self.name, self.sites)
        for name in ("batches", "rounds"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{self.name}: {name} {getattr(self, name)} must be at least 1")

    @property
    def sweeps(self) -> float:
        return 6.0

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        sites = choose_sites(gm, ctx, result, self.sites, _refusal)
        if not sites:
            return result
        ctx.require_batches()
        pieces = pieces_of(gm, {c.linear for site in sites for c in site.consumers}, 1)
        runs = TwoRuns(gm, ctx.batches)
        factors: Factors = {}
        scales: dict[ScaleSite, Tensor] = {}
        rows: list[tuple[object, ...]] = []
        for done, piece in enumerate(pieces):
            ctx.progress("decoupled-smoothquant", done, len(pieces))
            inside = [site for site in sites if _lies_in(site, piece, result)]
            weights = runs.weights(piece)
            some = _spread(len(ctx.batches), self.batches)
            search = _Search(piece, weights, [dict(runs.floats[i]) for i in some], inside)
            for index, (values, compared) in enumerate(runs.float_step(piece, weights)):
                search.see(values)
                if index in some:
                    search.wanted.append(compared)
            if not inside:
                continue
            found = ctx.once(f"block {piece.name}", partial(self._searched, search))
            for number, site in enumerate(inside):
                exponents = (
                    float(found.facts[f"p{number}"] or 0),
                    float(found.facts[f"q{number}"] or 0),
                )
                scale = found.tensors[f"scale{number}"]
                rows.append(
                    (site.name, site.kind, site.channels, *exponents,
                     found.facts["before"], found.facts["after"])
                )  # fmt: skip
                if exponents != OFF:
                    scales[site] = storable_factors(gm, site, scale)
                    add_factors(site, scales[site], factors)
        ctx.progress("decoupled-smoothquant", len(pieces), len(pieces))
        fold(gm, ctx, factors, self.name)
        result.changed = len(scales)
        result.sites = regions(gm, list(scales))
        columns = ("site", "kind", "channels", "p", "q", "block_db_before", "block_db_after")
        result.tables["scales"] = Table(columns, tuple(rows))
        return result

    def _searched(self, search: _Search) -> Finished:
        before = search.error()
        after = before
        for _ in range(self.rounds):
            start = dict(search.chosen)
            for site in search.sites:
                after = search.improve(site, after)
            if search.chosen == start:
                break
        facts: dict[str, float] = {"before": decibels(before), "after": decibels(after)}
        tensors = {}
        for number, site in enumerate(search.sites):
            facts |= dict(zip((f"p{number}", f"q{number}"), search.chosen[site], strict=True))
            tensors[f"scale{number}"] = search.scale(site, search.chosen[site])
        return Finished(tensors, facts)


def _refusal(site: ScaleSite) -> str | None:
    for consumer in site.consumers:
        if ExpertLinear.match(consumer.linear) is not None:
            return "experts read tokens in parts, and a block's error would follow the router"
    quantized = [c.linear for c in site.consumers if is_quantized(c.linear)]
    if not quantized:
        return "all matmuls that read it are FLOAT"
    if any(scheme_of(linear).activation is None for linear in quantized):
        return "an input of a matmul that reads it stays float"
    return None


def _lies_in(site: ScaleSite, piece: Piece, result: PassResult) -> bool:
    inside = [consumer.linear in piece.nodes for consumer in site.consumers]
    if any(inside) and not all(inside):
        result.skip(site.source, "the matmuls that read it lie in several blocks")
    return all(inside)


def _spread(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` batches of so many, far from each other."""
    wanted = min(wanted, count)
    return [round(i * (count - 1) / max(wanted - 1, 1)) for i in range(wanted)]


@dataclass(eq=False)
class _Search:
    """The error of a block as a function of the exponents of the sites in it."""

    piece: Piece
    weights: Values
    given: Sequence[Values]
    sites: Sequence[ScaleSite]
    wanted: list[Mapping[fx.Node, Tensor]] = field(default_factory=list)
    chosen: dict[ScaleSite, Exponents] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chosen = dict.fromkeys(self.sites, OFF)
        self._act = {site: torch.zeros(site.channels) for site in self.sites}
        self._met = {site: torch.zeros(site.channels) for site in self.sites}
        self._of: dict[fx.Node, tuple[ScaleSite, Tensor]] = {}
        for site in self.sites:
            for consumer in site.consumers:
                self._of[Linear.of(consumer.linear).input] = site, consumer.channel
                if is_quantized(consumer.linear):
                    weight = self.weights[Linear.of(consumer.linear).weight]
                    _grow(self._met[site], consumer.channel, weight.float().abs().amax(0))
        here = [n for n in self.piece.nodes if Linear.match(n) is not None and is_quantized(n)]
        self._readers = by_input(n for n in here if ExpertLinear.match(n) is None)
        self._rounded: dict[fx.Node, RoundedLinear] = {}

    def see(self, values: Values) -> None:
        """Widen the sizes of activations by a batch; its massive tokens count for nothing."""
        for site in self.sites:
            for consumer in site.consumers:
                x = values[Linear.of(consumer.linear).input].float()
                rows = x.reshape(-1, x.shape[-1]).abs()
                plain = rows[plain_tokens(rows.amax(1))]
                if len(plain):
                    _grow(self._act[site], consumer.channel, plain.amax(0))

    def scale(self, site: ScaleSite, exponents: Exponents) -> Tensor:
        """s `[channels]`, float64; 1 where nothing was seen."""
        if exponents == OFF:
            return torch.ones(site.channels, dtype=torch.float64)
        act, met = self._act[site].double(), self._met[site].double().clamp_min(SMALLEST)
        scale = (act ** exponents[0] / met ** exponents[1]).clamp_min(SMALLEST)
        return torch.where(act == 0, 1.0, scale)

    def error(self, site: ScaleSite | None = None, exponents: Exponents = OFF) -> float:
        """Of the block, with other exponents for one site."""
        for x, linears in self._readers.items():
            owner, channel = self._of.get(x, (None, None))
            if linears[0] in self._rounded and (site is None or owner is not site):
                continue
            columns = torch.ones(int(x.meta["val"].shape[-1]))
            if owner is not None and channel is not None:
                at = exponents if owner is site else self.chosen[owner]
                scale = self.scale(owner, at).float()
                columns = torch.where(channel < 0, 1.0, scale[channel.clamp_min(0)])
            self._rounded |= self._quantized(linears, columns)
        total = 0.0
        with torch.no_grad():
            for given, wanted in zip(self.given, self.wanted, strict=True):
                values = {**given, **self.weights}
                run_piece(self.piece.nodes, values, self._rounded)
                total += float(token_errors(values, wanted).mean())
        return total / max(len(self.given), 1)

    def improve(self, site: ScaleSite, least: float) -> float:
        """Choose the site's exponents; returns the block's error with them."""
        best = self.chosen[site]

        def attempt(candidates: Sequence[Exponents]) -> None:
            nonlocal best, least
            for candidate in candidates:
                if candidate != best and (now := self.error(site, candidate)) < least:
                    best, least = candidate, now

        if best == OFF:
            attempt([(p, round(1 - p, 3)) for p in COARSE])
        if best != OFF:
            attempt([(round(best[0] + step, 3), best[1]) for step in FINE])
            attempt([(best[0], round(best[1] + step, 3)) for step in FINE])
        self.chosen[site] = best
        self.error(site, best)  # what is rounded is that of the choice from here on
        return least

    def _quantized(
        self, linears: Sequence[fx.Node], columns: Tensor
    ) -> dict[fx.Node, RoundedLinear]:
        """The linears that read one value, once that is divided by the `columns` `[k]`."""
        rounded = {}
        for linear in linears:
            weight, spec = self.weights[Linear.of(linear).weight], weight_spec_of(linear)
            scaled = (weight.float() * columns).to(weight.dtype)
            size = spec.group_size_for(scaled.shape[1])
            groups = scaled.float().unflatten(1, (-1, size))
            grid = min_max_scale(scaled, size, spec)
            rounded[linear] = quantize_groups(groups, *grid, spec).flatten(1)
        activation = scheme_of(linears[0]).activation
        dtype = Linear.of(linears[0]).input.meta["val"].dtype
        energy = torch.stack([weight.square().sum(0) for weight in rounded.values()]).sum(0)

        def through(x: Tensor) -> Tensor:
            rows = (x.float() / columns).reshape(-1, x.shape[-1])
            if activation is not None:  # massive tokens are what `outliers` is for
                plain = plain_tokens(rows.abs().amax(1))
                rows[plain] = quantized_input(rows[plain], activation, energy, dtype)
            return rows.reshape(x.shape)

        return {linear: RoundedLinear(weight, through) for linear, weight in rounded.items()}


def _grow(into: Tensor, channel: Tensor, values: Tensor) -> None:
    used = channel >= 0
    into.scatter_reduce_(0, channel[used], values[used], "amax")
