"""`panguq tune --from`: fit an Ascend target to a table of op times."""

from __future__ import annotations

import argparse
import os
from typing import Any

from panguq.cli.command import print_json
from panguq.errors import InputError

DEFAULT_START = "ascend910b1"


def run(options: argparse.Namespace) -> int:
    """Read, fit, write, print."""
    from panguq.lowering.ascend.tuning.fit import MOST_SHAPES, check_new_name, fit_to_timings
    from panguq.lowering.ascend.tuning.table import read_op_table
    from panguq.lowering.ascend.tuning.timings import matmul_timings
    from panguq.lowering.target_files import save_target
    from panguq.lowering.targets import TARGETS, find_target

    for name in ("threads", "quick", "clock"):
        if getattr(options, name):
            raise InputError(
                f"--{name} is for measuring this machine, and --from measures nothing",
                "leave it out",
            )
    start = find_target(options.target or DEFAULT_START)
    check_new_name(options.out.stem, list(TARGETS))
    timings, others = matmul_timings(read_op_table(options.table))
    found = fit_to_timings(start, timings, options.out.stem, options.table.name)
    left = len(timings) - len(found.rows)
    if left:
        others[f"shapes without a kernel in the target, or beyond {MOST_SHAPES}"] = left
    save_target(found.target, options.out)
    if options.json:
        print_json(_as_json(found, others, start.name, options))
    else:
        print(_render(found, others, start.name, options))
    return 0


def _render(found: Any, others: dict[str, int], start: str, options: argparse.Namespace) -> str:
    from panguq.lowering.ascend.tuning.fit import summary

    rows = [("op", "m", "n", "k", "scheme", "weight", "calls", "measured us", "fitted us", "error")]
    for row in found.rows:
        problem = row.timing.problem
        sizes = (str(size) for size in (problem.m, problem.n, problem.k))
        rows.append(
            (
                row.timing.op,
                *sizes,
                problem.scheme.name,
                problem.weight_format,
                str(row.timing.calls),
                f"{row.timing.us:.2f}",
                f"{row.fitted_us:.2f}",
                f"{row.error:+.1%}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    before, after = summary(found, fitted=False), summary(found, fitted=True)
    lines += ["", f"started from {start}:"]
    for name, value in found.changed.items():
        lines.append(f"  {name}: {value:g} -> {found.target[name]:g}")
    lines += [
        f"errors, median and largest: {before[0]:.1%}, {before[1]:.1%} before; {after[0]:.1%}, "
        f"{after[1]:.1%} with the fitted constants",
        f"these {len(found.rows)} shapes are used as they were measured, and interpolated between "
        "two numbers of tokens; all others follow the constants",
    ]
    lines += [f"not used, {count} rows: {why}" for why, count in others.items()]
    return "\n".join([*lines, f"written to {options.out}; use it as --target {options.out}"])


def _as_json(
    found: Any, others: dict[str, int], start: str, options: argparse.Namespace
) -> dict[str, Any]:
    from panguq.lowering.ascend.tuning.fit import summary

    before, after = summary(found, fitted=False), summary(found, fitted=True)
    return {
        "out": os.fspath(options.out),
        "target": found.target.name,
        "started_from": start,
        "constants": {
            name: {"before": value, "fitted": found.target[name]}
            for name, value in found.changed.items()
        },
        "median_error": {"before": before[0], "fitted": after[0]},
        "largest_error": {"before": before[1], "fitted": after[1]},
        "rows": [
            {
                "op": row.timing.op,
                "kernel": row.timing.kernel,
                "m": row.timing.problem.m,
                "n": row.timing.problem.n,
                "k": row.timing.problem.k,
                "scheme": row.timing.problem.scheme.name,
                "dtype": row.timing.problem.dtype,
                "weight_format": row.timing.problem.weight_format,
                "calls": row.timing.calls,
                "us": row.timing.us,
                "before_us": row.before_us,
                "fitted_us": row.fitted_us,
                "error": row.error,
            }
            for row in found.rows
        ],
        "not_used": others,
    }
