"""AWQ: scale up the weight columns whose inputs are large, so that rounding harms them less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.decibels import decibels
from panguq.errors import RecipeError
from panguq.ir.analysis.channels import ScaleSite
from panguq.ir.edit import label
from panguq.ir.node_meta import is_quantized
from panguq.ir.views import Linear
from panguq.passes.scaling.folding import Factors
from panguq.passes.scaling.search import SeenInput, SiteError
from panguq.passes.scaling.sites import ScaleSites, chosen, left_alone
from panguq.tensors.work_folder import Finished

SMALLEST = 1e-4


@dataclass(frozen=True)
class Awq(ScaleSites):
    """Before: x / 1 ─► linear(W).  After: x / s ─► linear(W · s); same function, no new node.

    Per site of `ir/analysis/channels.py` and channel j, with all calibration tokens t of the
    float model:

        m_j = mean_t |X_tj|                                   X [tokens, k]
        s_j = max(m_j^r, 1e-4) / sqrt(max s · min s)          s_j = 1 where m_j = 0
        source weight, bias  /= s                             norm weight [k], or rows of a linear
        W[:, j]              *= s_j                           W [n, k]

    r is that of 0, 1/20 … 19/20 (`steps`) with the least sum, over the quantized linears that read
    the site, of |Q(W s) (x / s) - W x|^2 relative to |W x|^2 (`search.py`). Q is the linear's
    own scheme with a short search of clip ratios; where activations are quantized too, x / s goes
    through its quantizer. r = 0 is s = 1: a site that no other r helps is left alone, and no site
    gets worse by this measure. One channel may be several columns: then m_j is their mean.

    Source: Lin et al., AWQ, arXiv 2306.00978, equations 4 and 5. Its clip search is that of
    `quantize-weights: {clip_search: true}`, which comes later. The paper measures the output of a
    whole block; here it is that of the linears, each relative to its own size.
    """

    name: ClassVar[str] = "awq"
    steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise RecipeError(f"awq: steps is {self.steps}", "give at least 1")

    def refuse(self, site: ScaleSite) -> str | None:
        if any(is_quantized(c.linear) for c in site.consumers):
            return None
        return f"{label(site.consumers[0].linear)} is FLOAT: its weight is not quantized"

    def choose(
        self,
        gm: fx.GraphModule,
        site: ScaleSite,
        seen: Mapping[fx.Node, SeenInput],
        factors: Factors,
    ) -> Finished:
        error = SiteError(gm, site, seen, factors)
        size = _mean_abs(site, seen)
        powers = [step / self.steps for step in range(self.steps)]
        scales = [awq_scale(size, power) for power in powers]
        errors = error.of_all(scales)
        best = errors.index(min(errors))
        if best == 0:
            return left_alone("no power lowers the error of the matmuls behind it")
        scale = scales[best]
        return chosen(
            scale,
            power=powers[best],
            db_before=-decibels(errors[0]),
            db_after=-decibels(errors[best]),
            scale_spread=float(scale.max() / scale.min()),
        )

    def columns(self) -> tuple[str, ...]:
        return ("power", "db_before", "db_after", "scale_spread")


def awq_scale(size: Tensor, power: float) -> Tensor:
    """s `[channels]` from the mean magnitudes `[channels]`, float64."""
    size = size.double()
    alive = size > 0
    if not alive.any():
        return torch.ones_like(size)
    scale = (size**power).clamp_min(SMALLEST)
    scale = scale / (scale[alive].max() * scale[alive].min()).sqrt()
    return torch.where(alive, scale, 1.0)


def _mean_abs(site: ScaleSite, seen: Mapping[fx.Node, SeenInput]) -> Tensor:
    total = torch.zeros(site.channels, dtype=torch.float64)
    count = torch.zeros(site.channels, dtype=torch.float64)
    for consumer in site.consumers:
        scaled = consumer.channel >= 0
        which = consumer.channel[scaled]
        values = seen[Linear.of(consumer.linear).input].mean_abs.double()
        total.index_add_(0, which, values[scaled])
        count.index_add_(0, which, torch.ones(len(which), dtype=torch.float64))
    return total / count.clamp_min(1)
