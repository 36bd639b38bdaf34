"""Codes that lie between two neighbours until, share after share, they become one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from panguq.ir.quant_spec import QuantSpec
from panguq.passes.codes.adam import Adam
from panguq.passes.codes.weight_problem import Solution
from panguq.passes.codes.weight_scales import storable

STRETCH = 1.2
"""The sigmoid reaches from -0.1 to 1.1 and is cut there, so that 0 and 1 lie within reach."""

FARTHEST = 0.98
"""The largest distance between a code and the weight that counts, in steps of the grid."""


class SoftCodes:
    """The codes and group scales of one weight while they are learned.

    From a solution with codes c, zero point z and scale s for a weight w `[n, k]`: the level
    q = c - z is free to move to its neighbour q' on the side of w / s, unless the grid ends there.
    A free level is

        l + h(r),    h(r) = min(max(1.2 sigmoid(r) - 0.1, 0), 1),    l = min(q, q')

    and starts `pull` times the distance |w / s - q|, at most 0.98, away from q. The weight is
    (l + h) s exp(v) with v for each group, s exp(v) rounded as it is stored. r and v are learned
    (`step`); `harden` turns those levels that are nearest to a neighbour into it, for good.

    After TesseraQ's progressive adaptive rounding (arXiv 2410.19103); h is AdaRound's
    (arXiv 2004.10568).
    """

    def __init__(
        self,
        weight: Tensor,
        solution: Solution,
        spec: QuantSpec,
        dtype: torch.dtype,
        pull: float,
    ) -> None:
        self._solution, self._dtype = solution, dtype
        self._size = weight.shape[1] // solution.scale.shape[1]
        zero = solution.zero_point
        self._zero = torch.zeros(solution.scale.shape) if zero is None else zero.float()
        self._start = solution.scale.float()
        self.levels = solution.codes.float() - self._spread(self._zero)
        distance = weight.float() / self._spread(self._start) - self.levels
        neighbour = self.levels + distance.sign()
        low, high = (self._spread(end - self._zero) for end in (spec.quant_min, spec.quant_max))
        free = (distance != 0) & (neighbour >= low) & (neighbour <= high)
        self.free = free.flatten().nonzero().flatten()
        """Which levels are free, places in the flat weight, int64."""
        distance = distance.flatten()[self.free]
        away = distance.abs().clamp_max_(FARTHEST).mul_(pull)
        share = torch.where(distance > 0, away, 1 - away)
        self._lower = self.levels.flatten()[self.free] - (distance < 0).float()
        self._logit = torch.logit((share + (STRETCH - 1) / 2) / STRETCH)
        self._change = torch.zeros(self._start.shape)
        self._codes_adam, self._scale_adam = Adam.like(self._logit), Adam.like(self._change)
        self._place()

    def _spread(self, per_group: Tensor) -> Tensor:
        """`[n, groups]` for each input of its group, `[n, k]`."""
        return per_group.repeat_interleave(self._size, dim=1)

    def _shares(self) -> Tensor:
        """h of every free level."""
        return _cut(torch.sigmoid(self._logit))

    def _place(self) -> None:
        self.levels.view(-1)[self.free] = self._lower + self._shares()

    @property
    def scale(self) -> Tensor:
        """The scales `[n, groups]`, as they are stored."""
        scale = self._solution.scale
        return storable((self._start * self._change.exp()).to(scale.dtype), self._dtype)

    def values(self) -> Tensor:
        """The weight `[n, k]` in the stored dtype."""
        groups = self.levels.unflatten(1, (-1, self._size))
        return (groups * self.scale.float()[..., None]).flatten(1).to(self._dtype)

    @property
    def decided(self) -> Tensor:
        """How far each free level is from the middle between its neighbours, 0 to 0.5."""
        return (self._shares() - 0.5).abs_()

    def harden(self, which: Tensor) -> None:
        """Fix those free levels where `which`, bool like `decided`, at the nearer neighbour."""
        fixed = self.free[which]
        self.levels.view(-1)[fixed] = self._lower[which] + (self._shares()[which] >= 0.5)
        stay = ~which
        self.free, self._lower = self.free[stay], self._lower[stay]
        self._logit, self._codes_adam = self._logit[stay], self._codes_adam.kept(stay)

    def step(self, gradient: Tensor, number: int, rate: float, scale_rate: float) -> None:
        """Adam's step `number` against the loss' gradient at `values()`, float32 `[n, k]`."""
        by_scale = (gradient * self.levels).unflatten(1, (-1, self._size)).sum(-1)
        scale = self.scale.float()
        if len(self.free):
            at_levels = (gradient * self._spread(scale)).flatten()[self.free]
            sigmoid = torch.sigmoid(self._logit)
            cut = _cut(sigmoid)
            slope = (sigmoid * (1 - sigmoid)).mul_(STRETCH)
            slope.masked_fill_((cut <= 0) | (cut >= 1), 0.0)
            self._logit -= self._codes_adam.step(at_levels.mul_(slope), number, rate)
        self._change -= self._scale_adam.step(by_scale.mul_(scale), number, scale_rate)
        self._place()

    def solution(self) -> Solution:
        """What was learned; every level must be fixed."""
        assert not len(self.free)
        old = self._solution
        codes = (self.levels + self._spread(self._zero)).to(old.codes.dtype)
        return Solution(codes, self.scale, old.zero_point, old.extra, old.shared, old.notes)


def _cut(sigmoid: Tensor) -> Tensor:
    return (sigmoid * STRETCH - (STRETCH - 1) / 2).clamp_(0.0, 1.0)


def harden(weights: Sequence[SoftCodes], share: float) -> None:
    """Let at most 1 - `share` of all levels of these weights stay free, the least decided ones."""
    decided = [weight.decided for weight in weights]
    every = torch.cat(decided)
    left = round((1 - share) * sum(weight.levels.numel() for weight in weights))
    if left >= len(every):
        return
    limit = float(every.kthvalue(left).values) if left else -1.0
    for weight, distance in zip(weights, decided, strict=True):
        weight.harden(distance > limit)
