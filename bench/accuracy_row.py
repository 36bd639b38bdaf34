"""One row of the accuracy table in a process of its own: python -m bench.accuracy_row TASK.json

Prints the row as JSON in its last line. A process of its own makes the peak of memory the row's.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import panguq
from bench.accuracy_recipes import recipe_of
from bench.calibration import calibration_windows
from bench.memory import PeakMemory
from demo.fetch import default_cache, fetch_evaluation_text, fetch_model
from demo.run import windows_of
from panguq.errors import PanguqError
from panguq.evaluation import (
    COLLAPSED,
    evaluate,
    first_broken_node,
    logits_of,
    weight_figures,
    worst_matmul,
)
from panguq.ir.quant_spec import parse_scheme

FLOAT = "float"


@dataclass(frozen=True)
class Task:
    """What a row is made of: `sampled_windows` are of text that the model itself wrote."""

    recipe: str
    windows: int
    calibration_windows: int
    sampled_windows: int
    dithered: bool
    lowered: bool
    threads: int


def main() -> None:
    """Make the row and print it."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    torch.set_num_threads(task.threads)
    cache = default_cache()
    folder = fetch_model(cache)
    tokenizer = panguq.load_tokenizer(folder)
    if task.dithered:
        from bench.dithered import dithered_folder

        folder = dithered_folder(folder, cache)
    kinds = task.calibration_windows, task.sampled_windows
    calibration = calibration_windows(folder, cache, *kinds)
    windows = windows_of(fetch_evaluation_text(cache), tokenizer, task.windows)
    try:
        row = make_row(task, panguq.load_pretrained(folder), calibration, windows)
    except PanguqError as error:
        row = {"error": f"{type(error).__name__}: {error.message}"}
    print("\n" + json.dumps(row))


def make_row(task: Task, model: Any, calibration: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Compile under the task's recipe, measure that, and evaluate over `[windows, seq]` tokens.

    For `float` the model itself is evaluated. `perplexity` and the like are those of the
    fake-quant graph; with `lowered` the same figures of the lowered graph stand under that key.
    """
    reference = logits_of(model)
    if task.recipe == FLOAT:
        found = evaluate({FLOAT: reference}, windows, reference)[FLOAT]
        return {**found, "bits_per_weight": 8.0 * model.dtype.itemsize}
    started, cpu_before = time.perf_counter(), time.process_time()
    with PeakMemory() as peak:
        compiled = panguq.compile(
            model, recipe_of(task.recipe), calibration=calibration, progress=lambda *_: None
        )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_before
    stages = {"fake-quant": compiled.at_stage("fake-quant")}
    if task.lowered:
        stages["lowered"] = compiled
    results = evaluate({s: logits_of(m) for s, m in stages.items()}, windows, reference)
    row: dict[str, Any] = {**results["fake-quant"], **weight_figures(compiled)}
    row |= {"compile_seconds": seconds, "compile_cpu_seconds": cpu_seconds}
    row |= {"peak_resident_mib": peak.resident_mib, "peak_anonymous_mib": peak.anonymous_mib}
    row |= {"groups": group_sizes(compiled), "broken": broken(stages["fake-quant"], row, windows)}
    if task.lowered:
        row["lowered"] = results["lowered"]
    return row


def group_sizes(compiled: Any) -> dict[str, int]:
    """How many decoder matmuls have which bits and group size: `{"4-bit g64": 180, …}`."""
    counts: Counter[str] = Counter()
    for matmul in compiled.report.matmuls:
        weight = parse_scheme(matmul.scheme).weight
        if matmul.gives_logits or matmul.is_side:
            continue
        if weight is None:
            counts["float"] += 1
        elif weight.granularity == "per_group":
            counts[f"{weight.bits}-bit g{matmul.group_size}"] += 1
        else:
            counts[f"{weight.bits}-bit channel"] += 1
    return dict(sorted(counts.items()))


def broken(model: Any, row: dict[str, Any], windows: torch.Tensor) -> str | None:
    """Where a model that says nothing any more broke first; None for one that works.

    With logits that are not finite the first op that yields such values; with ten times the float
    model's perplexity the first matmul below 5 dB of local SQNR, or the worst one.
    """
    if not math.isfinite(row["perplexity"]):
        return first_broken_node(model, windows)
    if row["perplexity"] > COLLAPSED * row["float_perplexity"]:
        return worst_matmul(model)
    return None


if __name__ == "__main__":
    main()
