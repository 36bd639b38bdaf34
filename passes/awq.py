"""AWQ: scale up the weight columns whose inputs are large, so that rounding harms them less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.channels import KINDS, ScaleSite
from panguq.ir.edit import label
from panguq.ir.properties import Property
from panguq.passes.base import Pass, PassContext, PassResult, Table
from panguq.passes.scale_folding import (
    Factors,
    add_factors,
    check_kinds,
    choose_sites,
    fold,
    regions,
)
from panguq.passes.scale_search import SeenInput, SiteError, decibels, search_sites

SMALLEST = 1e-4


@dataclass(frozen=True)
class Awq(Pass):
    """Before: x / 1 ─► linear(W).  After: x / s ─► linear(W · s); same function, no new node.

    Per site of `ir/channels.py` and channel j, with all calibration tokens t of the float model:

        m_j = mean_t |X_tj|                                   X [tokens, k]
        s_j = max(m_j^r, 1e-4) / sqrt(max s · min s)          s_j = 1 where m_j = 0
        source weight, bias  /= s                             norm weight [k], or rows of a linear
        W[:, j]              *= s_j                           W [n, k]

    r is that of 0, 1/20 … 19/20 (`steps`) with the least sum, over the quantized linears that read
    the site, of |Q(W s) (x / s) - W x|^2 relative to |W x|^2 (`scale_search.py`). Q is the linear's
    own scheme with a short search of clip ratios; where activations are quantized too, x / s goes
    through its quantizer. r = 0 is s = 1: a site that no other r helps is left alone, and no site
    gets worse by this measure. One channel may be several columns: then m_j is their mean.

    Source: Lin et al., AWQ, arXiv 2306.00978, equations 4 and 5. Its clip search is that of
    `quantize-weights: {clip_search: true}`, which comes later. The paper measures the output of a
    whole block; here it is that of the linears, each relative to its own size.
    """

    name: ClassVar[str] = "awq"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.CANONICAL, Property.SCHEMES})
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.STATISTICS, Property.CALIBRATED})
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    sites: tuple[str, ...] = KINDS
    steps: int = 20

    def __post_init__(self) -> None:
        check_kinds(self.name, self.sites)
        if self.steps < 1:
            raise RecipeError(f"awq: steps is {self.steps}", "give at least 1")

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        sites = choose_sites(gm, ctx, result, self.sites, _refuse)
        if not sites:
            return result
        factors: Factors = {}
        changed: list[ScaleSite] = []
        rows: list[tuple[object, ...]] = []

        def choose(site: ScaleSite, seen: Mapping[fx.Node, SeenInput]) -> None:
            error = SiteError(gm, site, seen, factors)
            size = _mean_abs(site, seen)
            powers = [step / self.steps for step in range(self.steps)]
            scales = [awq_scale(size, power) for power in powers]
            errors = [error(scale) for scale in scales]
            best = errors.index(min(errors))
            if best == 0:
                result.skip(site.source, "no power lowers the error of the matmuls behind it")
                return
            scale = scales[best]
            add_factors(site, scale, factors)
            changed.append(site)
            quality = (decibels(errors[0]), decibels(errors[best]))
            spread = float(scale.max() / scale.min())
            rows.append((site.name, site.kind, site.channels, powers[best], *quality, spread))

        search_sites(gm, ctx, sites, choose)
        fold(gm, ctx, factors, self.name)
        result.changed = len(changed)
        result.sites = regions(gm, changed)
        columns = ("site", "kind", "channels", "power", "db_before", "db_after", "scale_spread")
        result.tables["scales"] = Table(columns, tuple(rows))
        return result


def awq_scale(size: Tensor, power: float) -> Tensor:
    """s `[channels]` from the mean magnitudes `[channels]`, float64."""
    size = size.double()
    alive = size > 0
    if not alive.any():
        return torch.ones_like(size)
    scale = (size**power).clamp_min(SMALLEST)
    scale = scale / (scale[alive].max() * scale[alive].min()).sqrt()
    return torch.where(alive, scale, 1.0)


def _refuse(site: ScaleSite) -> str | None:
    if any(not c.linear.meta["scheme"].is_float for c in site.consumers):
        return None
    return f"{label(site.consumers[0].linear)} is FLOAT: its weight is not quantized"


def _mean_abs(site: ScaleSite, seen: Mapping[fx.Node, SeenInput]) -> Tensor:
    total = torch.zeros(site.channels, dtype=torch.float64)
    count = torch.zeros(site.channels, dtype=torch.float64)
    for consumer in site.consumers:
        scaled = consumer.channel >= 0
        which = consumer.channel[scaled]
        values = seen[consumer.linear.args[0]].mean_abs.double()
        total.index_add_(0, which, values[scaled])
        count.index_add_(0, which, torch.ones(len(which), dtype=torch.float64))
    return total / count.clamp_min(1)
