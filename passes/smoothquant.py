"""Move the outliers of quantized activations into the weights, where they cost less."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from panguq.errors import InputError, NumericsError, RecipeError
from panguq.ir.channels import KINDS, ScaleSite, find_scale_sites
from panguq.ir.edit import get_tensor, label, set_tensor
from panguq.ir.properties import Property
from panguq.ir.sweep import sweep
from panguq.passes.base import Pass, PassContext, PassResult, Site, Table
from panguq.passes.observers import InputStatistics
from panguq.suggest import did_you_mean

SMALLEST = 1e-5  # clamps both w_j and s_j, as the reference code does
ROWS_AT_ONCE = 1024  # float64 copies of a large weight are made in slices of this many rows

Factors = dict[str, dict[int, Tensor]]
"""Float64 factors `[size of the axis]` to multiply a weight with, by weight name and axis."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Before: x / 1 ─► linear(W).  After: x / s ─► linear(W · s); same function, no new node.

    Per site of `ir/channels.py` and channel j (kinds: norm_linear, value_output, up_down,
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

    Plain tokens are all but the few massive ones (`InputStatistics`), whose channels no scale
    could tame. With `statistic: rms`, a_j and w_j are root mean squares instead of maxima.
    `alpha` moves more of the outliers into the weights as it grows; `alphas` overrides it for
    some kinds of site; `sites` lists the kinds to smooth.
    """

    name: ClassVar[str] = "smoothquant"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.CANONICAL, Property.SCHEMES})
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.STATISTICS, Property.CALIBRATED})
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    alpha: float = 0.5
    statistic: Literal["amax", "rms"] = "amax"
    sites: tuple[str, ...] = KINDS
    alphas: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for kind in (*self.sites, *(kind for kind, _ in self.alphas)):
            if kind not in KINDS:
                raise RecipeError(
                    f"smoothquant: unknown kind of site {kind!r}",
                    did_you_mean(str(kind), KINDS, "kinds"),
                )
        for alpha in (self.alpha, *(alpha for _, alpha in self.alphas)):
            if not 0 <= alpha <= 1:
                raise RecipeError(f"smoothquant: alpha is {alpha}", "give a number from 0 to 1")

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        sites = self._choose(gm, ctx, result)
        if not sites:
            return result
        observed = self._observe(gm, ctx, sites)
        factors: Factors = defaultdict(dict)
        rows = []
        for site in sites:
            alpha = dict(self.alphas).get(site.kind, self.alpha)
            act_size = _per_channel(site, observed)
            weight_size = _weight_size(gm, site, factors, self.statistic)
            scale = smoothing_scale(act_size, weight_size, alpha)
            _add_factors(gm, site, scale, factors)
            spread = (scale.min().item(), scale.median().item(), scale.max().item())
            largest = (act_size.max().item(), (act_size / scale).max().item())
            rows.append((site.name, site.kind, site.channels, *spread, *largest))
        for weight, by_axis in factors.items():
            set_tensor(gm, weight, ctx.store.put(_folded(weight, get_tensor(gm, weight), by_axis)))
        result.changed = len(sites)
        result.sites = _regions(gm, sites)
        columns = (
            "site",
            "kind",
            "channels",
            "min",
            "median",
            "max",
            "largest_before",
            "largest_after",
        )
        result.tables["scales"] = Table(columns, tuple(rows))
        return result

    def _choose(self, gm: fx.GraphModule, ctx: PassContext, result: PassResult) -> list[ScaleSite]:
        found, blocked = find_scale_sites(gm, ctx.interface)
        for item in blocked:
            result.skip(item.source, item.reason)
        chosen = []
        for site in found:
            float_input = [
                consumer.linear
                for consumer in site.consumers
                if consumer.linear.meta["scheme"].activation is None
            ]
            if site.kind not in self.sites:
                result.skip(site.source, f"sites of kind {site.kind} are not selected")
            elif float_input:
                scheme = float_input[0].meta["scheme"].name
                result.skip(
                    site.source, f"{label(float_input[0])} is {scheme}: its input stays float"
                )
            else:
                chosen.append(site)
        return chosen

    def _observe(
        self, gm: fx.GraphModule, ctx: PassContext, sites: Iterable[ScaleSite]
    ) -> dict[fx.Node, Tensor]:
        """The size of every channel of every smoothed linear's input, `[k]` each."""
        inputs = {_input(consumer.linear) for site in sites for consumer in site.consumers}
        seen = {value: InputStatistics(value.meta["val"].shape[-1]) for value in inputs}
        sweep(gm, ctx.batches, inputs, lambda node, value: seen[node].add(value), ctx.progress)
        if not all(statistics.tokens for statistics in seen.values()):
            raise InputError("smoothquant saw no calibration tokens", "give calibration data")
        if self.statistic == "rms":
            return {value: s.plain_mean_square.sqrt() for value, s in seen.items()}
        return {value: s.plain_amax for value, s in seen.items()}


def smoothing_scale(act_size: Tensor, weight_size: Tensor, alpha: float) -> Tensor:
    """s `[channels]` from the sizes of activations and weights `[channels]`, in float64."""
    weight_size = weight_size.double().clamp_min(SMALLEST)
    act_size = act_size.double()
    scale = (act_size**alpha / weight_size ** (1 - alpha)).clamp_min(SMALLEST)
    return torch.where(act_size == 0, 1.0, scale)


def _input(linear: fx.Node) -> fx.Node:
    return linear.args[0]


def _scatter_amax(into: Tensor, channel: Tensor, values: Tensor) -> None:
    scaled = channel >= 0
    into.scatter_reduce_(0, channel[scaled], values.double()[scaled], "amax")


def _per_channel(site: ScaleSite, observed: dict[fx.Node, Tensor]) -> Tensor:
    amax = torch.zeros(site.channels, dtype=torch.float64)
    for consumer in site.consumers:
        _scatter_amax(amax, consumer.channel, observed[_input(consumer.linear)])
    return amax


def _weight_size(gm: fx.GraphModule, site: ScaleSite, factors: Factors, statistic: str) -> Tensor:
    """Size of the consumers' columns, as they are after the sites before this one."""
    size = torch.zeros(site.channels, dtype=torch.float64)
    for consumer in site.consumers:
        weight = get_tensor(gm, consumer.weight)
        by_axis = factors.get(consumer.weight, {})
        rows = by_axis.get(0)
        scaled = weight if rows is None else weight * rows[:, None].float()
        if statistic == "rms":
            columns = scaled.float().square().mean(0).sqrt().double()
        else:
            columns = scaled.abs().amax(0).double()
        _scatter_amax(size, consumer.channel, columns * by_axis.get(1, 1.0))
    return size


def _add_factors(gm: fx.GraphModule, site: ScaleSite, scale: Tensor, factors: Factors) -> None:
    for edit in site.edits:
        factor = torch.where(edit.channel < 0, 1.0, scale[edit.channel.clamp_min(0)])
        factor = factor if edit.multiply else 1 / factor
        so_far = factors[edit.weight].get(edit.axis)
        factors[edit.weight][edit.axis] = factor if so_far is None else so_far * factor


def _folded(name: str, weight: Tensor, by_axis: dict[int, Tensor]) -> Tensor:
    """A new tensor: the weight times its factors, computed in float64 and rounded once."""
    folded = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for start in range(0, weight.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        product = weight[rows].to(torch.float64, copy=True)
        for axis, factor in by_axis.items():
            shape = [1] * weight.dim()
            shape[axis] = -1
            product *= (factor[rows] if axis == 0 else factor).view(shape)
        folded[rows] = product.to(weight.dtype)
    if not folded.isfinite().all():
        raise NumericsError(
            f"smoothquant: weight {name} overflows {weight.dtype} when it takes up the scales",
            "choose a smaller alpha, or compile in bfloat16",
        )
    return folded


def _regions(gm: fx.GraphModule, sites: list[ScaleSite]) -> list[Site]:
    """What each site rewrote, as functions whose inputs and outputs no site rescales.

    Where one site's consumer is another's source (norm ─► v_proj ─► o_proj) the value between
    them is rescaled, so both make one region.
    """
    regions: list[tuple[set[fx.Node], set[fx.Node]]] = []  # nodes computed, values rescaled
    for site in sites:
        nodes, rescaled = {c.linear for c in site.consumers}, set(site.values)
        for other in [r for r in regions if r[0] & rescaled or r[1] & nodes]:
            regions.remove(other)
            nodes, rescaled = nodes | other[0], rescaled | other[1]
        regions.append((nodes | {v for v in rescaled if v.op == "call_function"}, rescaled))
    order = {node: i for i, node in enumerate(gm.graph.nodes)}

    def labels_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
        return tuple(label(n) for n in sorted(nodes, key=order.__getitem__))

    found = []
    for nodes, rescaled in regions:
        read = {source for node in nodes for source in node.all_input_nodes}
        sizes = {n for n in read if isinstance(n.meta["val"], torch.SymInt)}
        inputs = {n for n in read - nodes - sizes if n.op != "get_attr"}
        found.append(Site(labels_of(inputs), labels_of(nodes - rescaled)))
    return found
