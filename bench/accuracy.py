"""Quality of recipes on SmolLM2-135M, each compiled and evaluated in a process of its own.

    python -m bench.accuracy [--recipes w8a8 w4a16-gptq my.yaml ...] [--windows 16]
        [--calibration-windows 8] [--sampled-windows 8] [--dithered] [--lowered]
        [--json FILE] [--write docs/accuracy.md]

Calibrates on Python's language reference and on text that the model wrote itself, and evaluates on
Wikipedia. With --json every row is kept as soon as it is finished, and a run that was interrupted
continues; `--dithered` compiles a copy of the model whose weights lie on
no 4-bit grid (bench/dithered.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench.accuracy_recipes import DEFAULT, known
from bench.accuracy_row import Task
from bench.accuracy_table import table
from bench.results import Results, Row, write_between_markers

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Make the rows that are not there yet, print the table, write it if asked to."""
    options = parse(sys.argv[1:])
    conditions = {
        "windows": options.windows,
        "calibration_windows": options.calibration_windows,
        "sampled_windows": options.sampled_windows,
        "dithered": options.dithered,
        "lowered": options.lowered,
        "threads": options.threads,
    }
    results = Results(options.json, conditions)
    for number, recipe in enumerate(options.recipes, start=1):
        if results.finished(recipe):
            continue
        print(f"{number}/{len(options.recipes)} {recipe}", file=sys.stderr, flush=True)
        if known(recipe):
            results.put(recipe, run_row(Task(recipe=recipe, **conditions)))
        else:
            results.put(recipe, {"error": "missing: no such recipe"})
    text = table({recipe: results.rows[recipe] for recipe in options.recipes})
    print(text)
    if options.write:
        name = "accuracy dithered" if options.dithered else "accuracy"
        write_between_markers(options.write, name, text)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy")
    parser.add_argument("--recipes", nargs="+", default=list(DEFAULT), help="names or YAML files")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 512 tokens")
    parser.add_argument("--calibration-windows", type=int, default=8, help="of 512 tokens")
    parser.add_argument("--sampled-windows", type=int, default=8, help="of the model's own text")
    parser.add_argument("--dithered", action="store_true", help="the second yardstick")
    parser.add_argument("--lowered", action="store_true", help="evaluate the lowered graph, too")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="keeps rows, so that a run can be continued")
    parser.add_argument("--write", type=Path, help="a page with markers for the table")
    return parser.parse_args(arguments)


def run_row(task: Task) -> Row:
    """The row of a task, or `{"error": …}` with what its process said last."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(asdict(task)), encoding="utf-8")
        command = [sys.executable, "-m", "bench.accuracy_row", str(file)]
        variables = {**os.environ, "OMP_NUM_THREADS": str(task.threads)}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": said[-1][:300]}
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
