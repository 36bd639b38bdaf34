"""Move the outliers of quantized activations into the weights, where they cost less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from panguq.decibels import decibels
from panguq.errors import RecipeError
from panguq.ir.analysis.channels import ScaleSite
from panguq.ir.edit import get_tensor, label
from panguq.ir.node_meta import is_quantized, scheme_of
from panguq.ir.views import Linear
from panguq.passes.scaling.folding import Factors, check_kinds
from panguq.passes.scaling.search import SeenInput, SiteError
from panguq.passes.scaling.sites import ScaleSites, chosen, left_alone
from panguq.tensors.work_folder import Finished

SMALLEST = 1e-5  # clamps both w_j and s_j, as the reference code does
STATISTICS = ("amax", "rms")


@dataclass(frozen=True)
class SmoothQuant(ScaleSites):
    """Before: x / 1 ─► linear(W).  After: x / s ─► linear(W · s); same function, no new node.

    Per site of `ir/analysis/channels.py` and channel j (kinds: norm_linear, value_output, up_down,
    linear_linear, embedding_linear), with tokens t and the linears that read the site:

        a_j = max_t |X_tj|                        X [tokens, k], plain calibration tokens
        w_j = max(max_i |W_ij|, 1e-5)             W [n, k], the largest over those linears
        s_j = max(a_j^alpha / w_j^(1-alpha), 1e-5)      s_j = 1 where a_j = 0
        source weight, bias  /= s                 norm weight [k], or rows of a linear [n, k]
        W[:, j]              *= s_j

    One channel may be several columns (grouped heads repeat it): then a_j and w_j are the
    largest over all of them. Sites are taken in graph order, each w_j from the weights as the
    sites before left them; every weight is folded in float64 and rounded once. Only sites
    whose linears all have quantized activations are smoothed. Caches of `value_output` sites
    hold v / s. Source: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4.

    `alpha: search` chooses statistic and alpha for every site: 0, 0.1 … 1 under both statistics,
    then 0.05 around the best, by the output error of the site's linears with weights and
    activations quantized under their schemes (`search.py`), on a sample of tokens. A site
    that no alpha helps is left alone. `alphas` holds some kinds of site at a fixed alpha.
    """

    name: ClassVar[str] = "smoothquant"
    alpha: float | Literal["search"] = 0.5
    statistic: Literal["amax", "rms"] = "amax"
    alphas: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kinds(self.name, (kind for kind, _ in self.alphas))
        for alpha in (self.alpha, *(alpha for _, alpha in self.alphas)):
            if alpha != "search" and (isinstance(alpha, str) or not 0 <= alpha <= 1):
                raise RecipeError(
                    f"smoothquant: alpha is {alpha}", "give a number from 0 to 1, or search"
                )

    def refuse(self, site: ScaleSite) -> str | None:
        quantized = [c.linear for c in site.consumers if is_quantized(c.linear)]
        if not quantized:  # a router among others stays float
            return f"{label(site.consumers[0].linear)} is FLOAT: its input stays float"
        for linear in quantized:
            if scheme_of(linear).activation is None:
                return f"{label(linear)} is {scheme_of(linear).name}: its input stays float"
        return None

    def samples(self) -> bool:
        return self.alpha == "search"

    def choose(
        self,
        gm: fx.GraphModule,
        site: ScaleSite,
        seen: Mapping[fx.Node, SeenInput],
        factors: Factors,
    ) -> Finished:
        alpha = dict(self.alphas).get(site.kind, self.alpha)
        wanted = STATISTICS if isinstance(alpha, str) else (self.statistic,)
        sizes = {s: _sizes(gm, site, seen, factors, s) for s in wanted}
        quality: tuple[float | str, float | str] = ("", "")
        if isinstance(alpha, str):
            searched, before, after = _search(SiteError(gm, site, seen, factors), sizes)
            if searched is None:
                return left_alone("no alpha lowers the error of the matmuls behind it")
            choice, quality = searched, (before, after)
        else:
            choice = (self.statistic, alpha)
        act_size, weight_size = sizes[choice[0]]
        scale = smoothing_scale(act_size, weight_size, choice[1])
        row = (
            *(scale.min().item(), scale.median().item(), scale.max().item()),
            *(act_size.max().item(), (act_size / scale).max().item()),
            *((*choice, *quality) if self.alpha == "search" else ()),
        )
        return chosen(scale, **dict(zip(self.columns(), row, strict=True)))

    def columns(self) -> tuple[str, ...]:
        searched = ("statistic", "alpha", "db_before", "db_after")
        return (
            *("min", "median", "max", "largest_before", "largest_after"),
            *(searched if self.alpha == "search" else ()),
        )


def smoothing_scale(act_size: Tensor, weight_size: Tensor, alpha: float) -> Tensor:
    """s `[channels]` from the sizes of activations and weights `[channels]`, in float64."""
    weight_size = weight_size.double().clamp_min(SMALLEST)
    act_size = act_size.double()
    scale = (act_size**alpha / weight_size ** (1 - alpha)).clamp_min(SMALLEST)
    return torch.where(act_size == 0, 1.0, scale)


def _search(
    error: SiteError, sizes: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[tuple[str, float] | None, float, float]:
    """The statistic and alpha of least error, None for s = 1, and the SQNR in dB before and after.

    Alphas in steps of 0.1 under both statistics first, then the neighbours of the best.
    """
    before = error(torch.ones_like(sizes["amax"][0]))
    best, least = None, before

    def try_all(candidates: list[tuple[str, float]]) -> None:
        nonlocal best, least
        scales = [smoothing_scale(*sizes[statistic], alpha) for statistic, alpha in candidates]
        for candidate, now in zip(candidates, error.of_all(scales), strict=True):
            if now < least:
                best, least = candidate, now

    try_all([(s, step / 10) for s in sizes for step in range(11)])
    if best is not None:
        near = (best[1] - 0.05, best[1] + 0.05)
        try_all([(best[0], alpha) for alpha in near if 0 <= alpha <= 1])
    return best, -decibels(before), -decibels(least)


def _sizes(
    gm: fx.GraphModule,
    site: ScaleSite,
    seen: Mapping[fx.Node, SeenInput],
    factors: Factors,
    statistic: str,
) -> tuple[Tensor, Tensor]:
    """Sizes of the site's activations and of the weights that they meet, `[channels]` both."""
    act_size = torch.zeros(site.channels, dtype=torch.float64)
    for consumer in site.consumers:
        statistics = seen[Linear.of(consumer.linear).input].statistics
        rms = statistic == "rms"
        each = statistics.plain_mean_square.sqrt() if rms else statistics.plain_amax
        _scatter_amax(act_size, consumer.channel, each)
    return act_size, _weight_size(gm, site, factors, statistic)


def _scatter_amax(into: Tensor, channel: Tensor, values: Tensor) -> None:
    scaled = channel >= 0
    into.scatter_reduce_(0, channel[scaled], values.double()[scaled], "amax")


def _weight_size(gm: fx.GraphModule, site: ScaleSite, factors: Factors, statistic: str) -> Tensor:
    """Size of the consumers' columns, as they are after the sites before this one."""
    size = torch.zeros(site.channels, dtype=torch.float64)
    for consumer in site.consumers:
        if not is_quantized(consumer.linear):
            continue
        weight = get_tensor(gm, consumer.weight)
        by_axis = factors.get(consumer.weight, {})
        rows = by_axis.get(0) if weight.dim() == 2 else None
        sizes = []
        for matrix in weight if weight.dim() == 3 else (weight,):
            scaled = matrix if rows is None else matrix * rows[:, None].float()
            if statistic == "rms":
                sizes.append(scaled.float().square().mean(0))
            else:
                sizes.append(scaled.abs().amax(0).double())
        if statistic == "rms":
            columns = torch.stack(sizes).mean(0).sqrt().double()
        else:
            columns = torch.stack(sizes).amax(0)
        _scatter_amax(size, consumer.channel, columns * by_axis.get(weight.dim() - 1, 1.0))
    return size
