"""What calibration remembers of a matmul's input."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

BINS = 8192
OUTLIER_TOKEN = 10.0  # an outlier token's amax is this many times the median token's


class Histogram:
    """Weighted counts over [-limit, limit] in equal bins; the limit doubles when exceeded."""

    def __init__(self) -> None:
        self.limit = 2.0**-10
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.low, self.high = math.inf, -math.inf

    def add(self, tokens: Tensor, weights: Tensor) -> None:
        """Count the values of `tokens` `[t, k]`, those of channel j `weights[j]` times.

        All tokens move the smallest and largest value seen; every fourth is counted.
        """
        low, high = (float(v) for v in torch.aminmax(tokens))
        self.low, self.high = min(self.low, low), max(self.high, high)
        limit = self.limit
        while max(-low, high) > limit:
            limit *= 2
        self.counts, self.limit = self._within(limit), limit
        sample = tokens[::4]
        bins = sample.add(self.limit).mul_(BINS / (2 * self.limit)).long().clamp_(0, BINS - 1)
        each = weights.expand_as(sample).reshape(-1)
        self.counts += torch.bincount(bins.reshape(-1), weights=each, minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Count what another one has counted, too."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        limit = max(self.limit, other.limit)
        self.counts = self._within(limit) + other._within(limit)
        self.limit = limit

    def _within(self, limit: float) -> Tensor:
        """The counts in bins up to a limit that is its own, doubled some times."""
        counts, own = self.counts, self.limit
        while own < limit:
            merged = counts.reshape(-1, 2).sum(1)
            counts = torch.zeros_like(counts)
            counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
            own *= 2
        return counts

    @property
    def centers(self) -> Tensor:
        """The middle of every bin, float64 `[bins]`."""
        width = 2 * self.limit / BINS
        return torch.arange(BINS, dtype=torch.float64) * width + width / 2 - self.limit


def plain_tokens(token_amax: Tensor) -> Tensor:
    """Which tokens `[t]` of a batch are not massive, from each one's largest magnitude."""
    # Padding may be all zero: the median is that of tokens which hold something.
    alive = token_amax[token_amax > 0]
    usual = alive.median() if len(alive) else token_amax.new_zeros(())
    return token_amax <= OUTLIER_TOKEN * usual


class InputStatistics:
    """Statistics of one value `[..., k]` over the calibration tokens.

    A few massive tokens can be a thousand times larger than all others. They are told apart:
    a token is plain unless its amax exceeds `OUTLIER_TOKEN` times its batch's median.
    Over all tokens: `channel_amax` and `mean_square`, `[k]`. Over plain tokens: `plain_amax`
    and `plain_mean_square`, `[k]`, and, where wanted, a histogram weighted by `column_energy`
    `[k]`, the squared norm of the weights that each channel meets.

    A value that `experts` experts read, sorted by expert, also has each one's `expert_tokens`
    `[experts]` and `expert_square_sum` `[experts, k]`. An expert that few tokens reach has seen all
    of them instead, if the pass says so.
    """

    def __init__(
        self, channels: int, column_energy: Tensor | None = None, experts: int | None = None
    ) -> None:
        self.column_energy = column_energy
        self.expert_tokens = None if experts is None else torch.zeros(experts)
        self.expert_square_sum = None if experts is None else torch.zeros(experts, channels)
        self.histogram = Histogram()
        self.channel_amax = torch.zeros(channels)
        self.plain_amax = torch.zeros(channels)
        self.square_sum = torch.zeros(channels)
        self.plain_square_sum = torch.zeros(channels)
        self.tokens = 0
        self.plain_tokens = 0

    def of(self, x: Tensor) -> InputStatistics:
        """Those of one batch alone, to be merged."""
        experts = None if self.expert_tokens is None else len(self.expert_tokens)
        found = InputStatistics(x.shape[-1], self.column_energy, experts)
        found._observe(x)
        return found

    def merge(self, other: InputStatistics) -> None:
        """Take in what another one has seen, after all that was merged before it."""
        self.plain_amax = torch.maximum(self.plain_amax, other.plain_amax)
        self.channel_amax = torch.maximum(self.channel_amax, other.channel_amax)
        self.plain_square_sum += other.plain_square_sum
        self.square_sum += other.square_sum
        self.tokens += other.tokens
        self.plain_tokens += other.plain_tokens
        if self.column_energy is not None:
            self.histogram.merge(other.histogram)
        if self.expert_tokens is not None and self.expert_square_sum is not None:
            assert other.expert_tokens is not None and other.expert_square_sum is not None
            self.expert_tokens += other.expert_tokens
            self.expert_square_sum += other.expert_square_sum

    def add(self, x: Tensor) -> None:
        """Observe one batch."""
        self.merge(self.of(x))

    def _observe(self, x: Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1]).float()
        magnitude = tokens.abs()
        plain = plain_tokens(magnitude.amax(1))
        which, massive = (mask.nonzero().flatten() for mask in (plain, ~plain))
        of_massive = magnitude.index_select(0, massive)
        if len(massive):
            magnitude = magnitude.index_select(0, which)
        self.plain_amax = torch.maximum(self.plain_amax, magnitude.amax(0))
        self.channel_amax = torch.maximum(self.channel_amax, self.plain_amax)
        squares = magnitude.square_().sum(0)  # in place: copies cost as much as the sums
        self.plain_square_sum += squares
        self.square_sum += squares
        if len(massive):
            self.channel_amax = torch.maximum(self.channel_amax, of_massive.amax(0))
            self.square_sum += of_massive.square_().sum(0)
        self.tokens += len(tokens)
        self.plain_tokens += len(which)
        if self.column_energy is not None:
            kept = tokens.index_select(0, which) if len(massive) else tokens
            self.histogram.add(kept, self.column_energy)

    def add_of_expert(self, expert: int, rows: Tensor) -> None:
        """Observe rows `[r, k]` as one expert meets them."""
        assert self.expert_tokens is not None and self.expert_square_sum is not None
        self.expert_tokens[expert] += len(rows)
        self.expert_square_sum[expert] += rows.float().square().sum(0)

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each channel over all tokens, `[k]`; or each expert's, `[experts, k]`.

        An expert that met nothing has that of all rows.
        """
        overall = self.square_sum / max(self.tokens, 1)
        if self.expert_tokens is None or self.expert_square_sum is None:
            return overall
        each = self.expert_square_sum / self.expert_tokens.clamp_min(1)[:, None]
        return torch.where(self.expert_tokens[:, None] > 0, each, overall)

    @property
    def plain_mean_square(self) -> Tensor:
        """Mean square of each channel over plain tokens, `[k]`."""
        return self.plain_square_sum / max(self.plain_tokens, 1)

    @property
    def channel_ratio(self) -> float:
        """The largest channel's amax over the median channel's."""
        return float(self.channel_amax.max() / self.channel_amax.median().clamp_min(1e-30))


def state_of(of: InputStatistics | Histogram, prefix: str) -> dict[str, Tensor]:
    """All that was observed, as tensors by name; numbers become tensors of no dimension."""
    found: dict[str, Tensor] = {}
    for name, value in vars(of).items():
        if isinstance(value, Histogram):
            found |= state_of(value, f"{prefix}/{name}")
        elif isinstance(value, Tensor):
            found[f"{prefix}/{name}"] = value
        elif isinstance(value, float):
            found[f"{prefix}/{name}"] = torch.tensor(value, dtype=torch.float64)
        elif isinstance(value, int):
            found[f"{prefix}/{name}"] = torch.tensor(value, dtype=torch.int64)
    return found


def fill_state(
    into: InputStatistics | Histogram, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """Put back what `state_of` gave, into attributes that are there anyway."""
    for name, value in list(vars(into).items()):
        stored = tensors.get(f"{prefix}/{name}")
        if isinstance(value, Histogram):
            fill_state(value, tensors, f"{prefix}/{name}")
        elif stored is not None:
            setattr(into, name, stored if isinstance(value, Tensor | None) else stored.item())
