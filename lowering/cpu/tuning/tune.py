"""Fit the costs of the CPU target to this machine: what `panguq tune` does."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from panguq.errors import LoweringError
from panguq.kernels.cpu.multiplying import seconds_by_dtype
from panguq.lowering.cpu.target import CPU, CpuTarget
from panguq.lowering.cpu.tuning.calls import COLD_BYTES, KernelCalls, Shape
from panguq.lowering.cpu.tuning.fit import KernelFit, fit_kernel, predict_us
from panguq.lowering.cpu.tuning.timing import CLOCKS, Timing, TimingBudget, time_in_turn

NAME = "cpu-tuned"


@dataclass(frozen=True)
class TuningGrid:
    """What is timed: every shape with every number of tokens, up to `most_products` m·n·k."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    budget: TimingBudget
    most_products: int = 12 * 10**8
    cold_bytes: int = COLD_BYTES
    seed: int = 0

    def tokens_of(self, shape: Shape) -> list[int]:
        """The numbers of tokens for a shape."""
        return [m for m in self.tokens if m * shape.n * shape.k <= self.most_products]


FULL = TuningGrid(
    shapes=(
        *(Shape(192, 576), Shape(576, 576), Shape(1536, 576), Shape(576, 1536)),
        *(Shape(1024, 1024), Shape(2048, 704), Shape(2048, 2048), Shape(4096, 4096)),
    ),
    tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    budget=TimingBudget(repeats=7, seconds=0.002),
)
QUICK = TuningGrid(
    shapes=(Shape(192, 576), Shape(576, 576), Shape(1536, 576)),
    tokens=(1, 4, 16, 64, 256),
    budget=TimingBudget(repeats=3, seconds=0.0005),
)

TuningProgress = Callable[[str, float], None]
"""Called before each shape with what comes next and the seconds that are left, by estimate."""


@dataclass(frozen=True)
class Tuning:
    """A tuned target, the fit of each of its kernels, the timings, and how many times as long as
    in float32 a matmul of many tokens takes in bfloat16, which `precision: auto` goes by."""

    target: CpuTarget
    fits: dict[str, KernelFit]
    timings: tuple[Timing, ...]
    bfloat16_ratio: float


def tune(
    grid: TuningGrid = FULL,
    threads: int | None = None,
    clock: str = "wall",
    progress: TuningProgress = lambda what, seconds: None,
) -> Tuning:
    """Time every kernel of the CPU target on this machine and fit its costs.

    threads: None is PyTorch's present number. clock: `wall`, or `cpu`, which counts only the time
    of one thread and suits a machine that is shared. Raises LoweringError for numbers of
    threads that the machine does not have, and for the clock `cpu` with several threads.
    """
    threads = check_threads(threads, clock)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            timings = _measure(grid, clock, progress)
            seconds = seconds_by_dtype()
    finally:
        torch.set_num_threads(before)
    source = f"fitted to medians of panguq tune on {machine(threads)}, {clock} clock"
    target, fits = fit_target(timings, source)
    return Tuning(target, fits, timings, seconds[torch.bfloat16] / seconds[torch.float32])


def fit_target(timings: Sequence[Timing], source: str) -> tuple[CpuTarget, dict[str, KernelFit]]:
    """A CPU target from timings of all its kernels. Raises LoweringError if they are too few."""
    fits = {}
    for kernel, known in CPU.kernels.items():
        own = [timing for timing in timings if timing.kernel == kernel]
        if not own:
            raise LoweringError(f"{kernel}: no timings", "give timings of every kernel")
        fits[kernel] = fit_kernel(own, known.weight_bytes_per_weight, source)
    return CpuTarget(NAME, {kernel: fit.cost for kernel, fit in fits.items()}), fits


def check_threads(threads: int | None, clock: str = "wall") -> int:
    """The number of threads. Raises LoweringError if it cannot be had or timed."""
    if threads is None:
        threads = torch.get_num_threads()
    most = os.cpu_count() or 1
    if not 1 <= threads <= most:
        raise LoweringError(
            f"threads: {threads} is not between 1 and {most}, the CPUs of this machine",
            "leave it out for PyTorch's own number",
        )
    if clock not in CLOCKS:
        raise LoweringError(f"clock: {clock!r} is none of {', '.join(CLOCKS)}")
    if clock == "cpu" and threads > 1:
        raise LoweringError(
            f"the clock cpu counts one thread, and there are {threads}", "tune with one thread"
        )
    return threads


def machine(threads: int) -> str:
    """What was measured on: `AMD EPYC, x86_64, 1 thread, PyTorch 2.13.0`."""
    release = torch.__version__.partition("+")[0]
    count = "1 thread" if threads == 1 else f"{threads} threads"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {platform.machine()} {capability}, {count}, PyTorch {release}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def _measure(grid: TuningGrid, clock: str, progress: TuningProgress) -> tuple[Timing, ...]:
    work = [_expected_seconds(grid, shape) for shape in grid.shapes]
    timings: list[Timing] = []
    started = time.monotonic()
    for position, shape in enumerate(grid.shapes):
        done, left = sum(work[:position]), sum(work[position:])
        speed = (time.monotonic() - started) / done if done else 1.0
        what = f"{position + 1} of {len(grid.shapes)}: n={shape.n} k={shape.k}"
        progress(what, left * speed)
        calls = KernelCalls(shape, grid.seed, grid.cold_bytes)
        keyed = {(k, m): call for m in grid.tokens_of(shape) for k, call in calls(m).items()}
        for (kernel, m), us in time_in_turn(keyed, grid.budget, CLOCKS[clock]).items():
            timings.append(Timing(kernel, m, shape.n, shape.k, us))
    return tuple(timings)


def _expected_seconds(grid: TuningGrid, shape: Shape) -> float:
    """By the built-in costs: only to say how long it will take."""
    total = 0.0
    for m in grid.tokens_of(shape):
        for kernel, cost in CPU.kernels.items():
            one = predict_us(cost, Timing(kernel, m, shape.n, shape.k, ())) / 1e6
            total += 2 * one + grid.budget.repeats * max(one, grid.budget.seconds)
    return total
