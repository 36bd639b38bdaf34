"""How good the CPU target's choices are: the chosen kernel's time against the best legal one's.

    python -m bench.cpu_target [--target FILE …] [--threads N] [--clock cpu] [--json FILE]

Tunes first (unless every target is given), then measures every legal candidate afresh on other
shapes and numbers of tokens, and asks the selection what it would have run. Only schemes for which
a CPU has a choice are in the grid: W8A16 and W4A16. Every row is printed; nothing passes or fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from panguq.ir.quant_spec import parse_scheme
from panguq.lowering.cpu.candidates import cpu_candidates
from panguq.lowering.cpu.cost import MANY_TOKENS, cpu_cost_name
from panguq.lowering.cpu.tuning.calls import KernelCalls, Shape, TimedCall
from panguq.lowering.cpu.tuning.timing import CLOCKS, TimingBudget, time_in_turn
from panguq.lowering.cpu.tuning.tune import FULL, QUICK, check_threads, machine, tune
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.select_kernel import select_kernel
from panguq.lowering.target import Target
from panguq.lowering.targets import find_target

SEED = 1  # other data than tuning's
MODEL_SHAPES = [Shape(192, 576), Shape(576, 576), Shape(1536, 576), Shape(576, 1536)]
LARGE_SHAPES = [Shape(4096, 4096), Shape(12800, 4096), Shape(4096, 12800)]
ODD_SHAPES = [Shape(1040, 992), Shape(720, 2400), Shape(3008, 320), Shape(1000, 1000)]
TOKENS = [1, 3, 12, 20, 40, 80, 100, 200, 512, 1024]
MOST_PRODUCTS = 3 * 10**9
"""Larger matmuls are left out: with 52 million weights, prompts beyond 57 tokens."""


@dataclass(frozen=True)
class Row:
    """One matmul: the median microseconds of each legal candidate, and what each target chose."""

    scheme: str
    m: int
    n: int
    k: int
    microseconds: dict[str, float]
    chosen: dict[str, str]

    @property
    def best(self) -> str:
        """The candidate with the smallest median."""
        return min(self.microseconds, key=lambda name: self.microseconds[name])

    def excess(self, target: str) -> float:
        """The time of the target's choice above the best, as a share of the best."""
        return self.microseconds[self.chosen[target]] / self.microseconds[self.best] - 1


def problem(shape: Shape, scheme: str) -> MatmulProblem:
    """The matmul for any m; groups are those that tuning's data has."""
    if scheme == "W4A16":
        whole = shape.group_size == shape.k
        scheme = "w4a16-per_channel" if whole else f"w4a16-g{shape.group_size}"
    return MatmulProblem(None, shape.n, shape.k, parse_scheme(scheme))


def candidates(calls: KernelCalls, scheme: str, m: int) -> dict[str, TimedCall]:
    """What the legal candidates of a scheme can do, by the names of their costs."""
    found = calls(m)
    if scheme == "W8A16":
        found["dequantized_linear"] = calls.dequantized_int8(m)
    legal = [c.kernel for c in cpu_candidates(problem(calls.shape, scheme)) if c.refusal is None]
    many = [MANY_TOKENS[kernel] for kernel in legal if kernel in MANY_TOKENS]
    return {name: found[name] for name in dict.fromkeys([*legal, *many])}


def measure(
    shape: Shape, tokens: Sequence[int], targets: Sequence[Target], budget: TimingBudget, clock: str
) -> list[Row]:
    """The rows of one shape; all its calls take turns."""
    calls = KernelCalls(shape, SEED)
    keyed = {
        (scheme, m, name): call
        for scheme in ("W8A16", "W4A16")
        for m in tokens
        for name, call in candidates(calls, scheme, m).items()
    }
    samples = time_in_turn(keyed, budget, CLOCKS[clock])
    rows = []
    for scheme, m in dict.fromkeys((scheme, m) for scheme, m, _ in keyed):
        medians = {
            name: statistics.median(us)
            for (own, tokens_of, name), us in samples.items()
            if (own, tokens_of) == (scheme, m)
        }
        chosen = {target.name: choice(shape, scheme, m, target) for target in targets}
        rows.append(Row(scheme, m, shape.n, shape.k, medians, chosen))
    return rows


def choice(shape: Shape, scheme: str, m: int, target: Target) -> str:
    """What the compiled graph would run for m tokens, by the name of its cost."""
    found = select_kernel(problem(shape, scheme), target)
    return cpu_cost_name(found.kernel, found.few_tokens, m)


def render_rows(rows: Sequence[Row], target: str) -> str:
    """A Markdown table: a row a matmul."""
    lines = ["| scheme | m | n | k | chosen | us | best | us | excess |", "|" + "---|" * 9]
    for row in rows:
        chosen, best = row.chosen[target], row.best
        lines.append(
            f"| {row.scheme} | {row.m} | {row.n} | {row.k} | {chosen} | "
            f"{row.microseconds[chosen]:.0f} | {best} | {row.microseconds[best]:.0f} | "
            f"{row.excess(target):.1%} |"
        )
    return "\n".join(lines)


def summary(rows: Sequence[Row], target: str) -> str:
    """Mean and worst excess; only rows with two candidates or more count."""
    real = [row for row in rows if len(row.microseconds) > 1]
    excess = [row.excess(target) for row in real]
    worst = max(real, key=lambda row: row.excess(target))
    wrong = sum(e > 0 for e in excess)
    return (
        f"target {target}: {len(real)} matmuls with a choice ({len(rows) - len(real)} without): "
        f"mean excess {statistics.fmean(excess):.2%}, worst {max(excess):.1%} ({worst.scheme} "
        f"m={worst.m} n={worst.n} k={worst.k}), not the fastest in {wrong}"
    )


def main() -> None:
    """Parse arguments, tune, measure, print."""
    parser = argparse.ArgumentParser(description="Check the CPU target's choices.")
    parser.add_argument("--target", nargs="+", help="target files (default: tuned now, and cpu)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    threads = check_threads(options.threads, options.clock)
    if options.target:
        targets = [find_target(name) for name in options.target]
    else:
        print("tuning", file=sys.stderr)
        grid = QUICK if options.quick else FULL
        targets = [tune(grid, threads, options.clock).target, find_target("cpu")]
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    print(f"{machine(threads)}; {options.clock} clock, medians of {options.repeats} repeats\n")
    shapes = [*MODEL_SHAPES, *ODD_SHAPES, *([] if options.quick else LARGE_SHAPES)]
    rows: list[Row] = []
    for shape in shapes:
        print(f"n={shape.n} k={shape.k}", file=sys.stderr)
        tokens = [m for m in TOKENS if m * shape.n * shape.k <= MOST_PRODUCTS]
        rows += measure(shape, tokens, targets, TimingBudget(options.repeats), options.clock)
    first = targets[0].name
    print(render_rows(rows, first) + "\n")
    for target in targets:
        print(summary(rows, target.name))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
