"""Time calls in turn, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from panguq.lowering.cpu.tuning.calls import TimedCall

Clock = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}
"""`cpu` is only the time of the calling thread: for one thread, on a machine that is shared."""


@dataclass(frozen=True)
class TimingBudget:
    """How often a call is timed, and for how long each time."""

    repeats: int = 7
    seconds: float = 0.002


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call of a kernel, once for every repeat."""

    kernel: str
    m: int
    n: int
    k: int
    microseconds: tuple[float, ...]

    @property
    def median_us(self) -> float:
        """Median over repeats."""
        return statistics.median(self.microseconds)


def time_in_turn(
    calls: Mapping[Key, TimedCall], budget: TimingBudget, clock: Clock
) -> dict[Key, tuple[float, ...]]:
    """Microseconds per call, `budget.repeats` of each, after one call that is not counted.

    Each sample is as many calls in a row as fit `budget.seconds`, at least one.
    """
    counts = {}
    for key, call in calls.items():
        call()
        counts[key] = max(1, int(budget.seconds * 1e6 / max(_sample_us(call, 1, clock), 1.0)))
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(budget.repeats):
        for key, call in calls.items():
            samples[key].append(_sample_us(call, counts[key], clock))
    return {key: tuple(us) for key, us in samples.items()}


def _sample_us(call: TimedCall, calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls * 1e6
