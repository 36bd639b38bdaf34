"""An explanation as a CSV file, and the gain of Split-K as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np

from panguq.errors import LoweringError
from panguq.explain.matmul import CandidateRow
from panguq.extras import require
from panguq.files.whole_file import output_file
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.target import Floats, Target

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def candidates_csv(problem: MatmulProblem, rows: Sequence[CandidateRow]) -> str:
    """A line per candidate: shape, kernel, cost, every term in microseconds, refusal."""
    found = [r.cost for r in rows if r.cost]
    names = list(found[0].terms) if found and found[0].overlapped else []
    names = names or sorted({name for cost in found for name in cost.terms})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    first = ["m", "n", "k", "scheme", "kernel", "schedule", "splits", "tile", "storage", "total_us"]
    writer.writerow([*first, *names, "refusal"])
    for row in rows:
        c = row.candidate
        tile = "x".join(map(str, c.tile)) if c.tile else ""
        cells = [problem.m, problem.n, problem.k, problem.scheme.name]
        cells += [c.kernel, c.schedule, c.splits, tile, c.storage]
        values = [""] * (1 + len(names))
        if row.cost is not None:
            numbers = [row.cost.total_us, *(row.cost.terms[name] for name in names)]
            values = [f"{value:.4f}" for value in numbers]
        writer.writerow([*cells, *values, c.refusal or ""])
    return text.getvalue()


def split_k_gain(problem: MatmulProblem, target: Target, tokens: Sequence[int] = TOKENS) -> Floats:
    """For each m, the cost of the cheapest kernel that does not split k over the cheapest Split-K
    kernel of panguq: above 1, Split-K is faster. Raises LoweringError if no Split-K kernel fits."""
    found = [
        c
        for c in target.candidates(replace(problem, m=None))
        if c.refusal is None and c.storage != "float"
    ]
    split = [row for row, c in enumerate(found) if c.schedule == "split_k"]
    whole = [row for row, c in enumerate(found) if c.schedule != "split_k"]
    if not split or not whole:
        raise LoweringError(
            f"{problem.scheme.name} for n={problem.n}, k={problem.k} has no Split-K kernel",
            "a heat map is for W8A8, W8A8_DYNAMIC, W4A16 and W4A16_ASYM on an Ascend target",
        )
    costs = target.total_us(found, problem, np.array(tokens))
    gain: Floats = costs[whole].min(axis=0) / costs[split].min(axis=0)
    return gain


def neighbours(problem: MatmulProblem, largest: int | None) -> list[tuple[int, int]]:
    """(n, k) of the problem and of shapes with about as many weights, from wide to deep, up to
    sizes of `largest`."""
    pairs = []
    for power in range(4, -5, -1):
        factor = 2.0**power
        n, k = (
            max(256, round(size / 256) * 256) for size in (problem.n * factor, problem.k / factor)
        )
        if power == 0:
            pairs.append((problem.n, problem.k))
        elif largest is None or max(n, k) <= largest:
            pairs.append((n, k))
    return list(dict.fromkeys(pairs))


def save_heat_map(
    path: Path,
    problem: MatmulProblem,
    shapes: Sequence[tuple[int, int]],
    target: Target,
    tokens: Sequence[int] = TOKENS,
) -> None:
    """A PNG of `split_k_gain` over m and (n, k). Raises InputError without matplotlib."""
    require("matplotlib", "a heat map")
    agg = import_module("matplotlib.backends.backend_agg")
    colors = import_module("matplotlib.colors")
    figures = import_module("matplotlib.figure")
    gains = np.array([split_k_gain(replace(problem, n=n, k=k), target, tokens) for n, k in shapes])
    figure = figures.Figure(figsize=(1.5 + 0.75 * len(tokens), 1.8 + 0.42 * len(shapes)))
    agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    norm = colors.TwoSlopeNorm(1.0, min(0.5, float(gains.min())), max(2.0, float(gains.max())))
    image = axes.imshow(gains, cmap="RdBu", norm=norm, aspect="auto")
    axes.set_xticks(range(len(tokens)), [str(m) for m in tokens])
    axes.set_yticks(range(len(shapes)), [f"{n} x {k}" for n, k in shapes])
    axes.set_xlabel("m (tokens)")
    axes.set_ylabel("n x k")
    for (row, column), gain in np.ndenumerate(gains):
        ink = "white" if abs(float(norm(gain)) - 0.5) > 0.35 else "black"
        axes.text(column, row, f"{gain:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_title(f"Predicted gain of Split-K, {problem.scheme.name}, {target.name}")
    figure.colorbar(image, ax=axes, label="time without / time with Split-K")
    figure.tight_layout()
    with output_file(path, LoweringError) as file:
        figure.savefig(file, format="png", dpi=120)
