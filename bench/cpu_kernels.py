"""Time every CPU matmul of panguq against float32 F.linear, per shape and number of tokens.

    python -m bench.cpu_kernels [--threads N …] [--clock cpu] [--warm] [--json FILE]

The kernels of a shape take turns, so that a slow moment of the machine hits all of them. Each call
uses the next of several copies of the weights: together they exceed the cache, as the layers of a
model do (`--warm` keeps one copy).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from panguq.lowering.cpu.tuning.calls import COLD_BYTES, KernelCalls, Shape
from panguq.lowering.cpu.tuning.timing import CLOCKS, Timing, TimingBudget, time_in_turn
from panguq.lowering.cpu.tuning.tune import check_threads

SHAPES = [
    *(Shape(192, 576), Shape(576, 576), Shape(960, 576), Shape(1536, 576), Shape(3072, 576)),
    *(Shape(576, 1536), Shape(4096, 4096)),
]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 512]


def measure(
    shape: Shape, tokens: list[int], budget: TimingBudget, clock: str, cold: int
) -> list[Timing]:
    """Timings of every kernel for every number of tokens."""
    calls = KernelCalls(shape, cold_bytes=cold)
    keyed = {(name, m): call for m in tokens for name, call in calls(m).items()}
    samples = time_in_turn(keyed, budget, CLOCKS[clock])
    return [Timing(name, m, shape.n, shape.k, us) for (name, m), us in samples.items()]


def render(timings: list[Timing]) -> str:
    """A block for each number of tokens: median, range, and times faster than float32."""
    lines = []
    for m in dict.fromkeys(t.m for t in timings):
        rows = [t for t in timings if t.m == m]
        base_us = next(t.median_us for t in rows if t.kernel == "linear")
        lines.append(f"m={m} n={rows[0].n} k={rows[0].k}")
        lines += [
            f"  {t.kernel:32s} {t.median_us:10.1f} us ({min(t.microseconds):.1f} .. "
            f"{max(t.microseconds):.1f})  {base_us / t.median_us:6.2f}x"
            for t in rows
        ]
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description="Time every CPU matmul against float32.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--warm", action="store_true", help="keep the weights in the cache")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(check_threads(threads, options.clock))
        print(f"threads={threads}")
        for shape in SHAPES:
            budget, cold = TimingBudget(options.repeats), 0 if options.warm else COLD_BYTES
            timings = measure(shape, options.tokens, budget, options.clock, cold)
            print(render(timings), flush=True)
            rows += [{"threads": threads, **asdict(timing)} for timing in timings]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
