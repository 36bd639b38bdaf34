"""Fit the models of CANN's ops to published times, and say how far they hold.

    python -m bench.op_times                  # every op: errors, and those of rows left out
    python -m bench.op_times --rows           # every row, too
    python -m bench.op_times --write          # fit anew and write op_times/fitted.py

Fitted to `bench/data/cann_bench_even.csv` alone. Constants that no row bears on stay at what the
fit starts from. A row left out is predicted from a fit to the op's other rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from bench.timings import with_constants
from panguq.explain.op_rows import TableRow, read_rows
from panguq.lowering.ascend.op_times.call import OpModel
from panguq.lowering.ascend.op_times.models import FAMILIES, MODELS
from panguq.lowering.ascend.op_times.price import price
from panguq.lowering.target import Target
from panguq.lowering.targets import find_target

ROOT = Path(__file__).parent.parent
DATA = ROOT / "bench" / "data" / "cann_bench_even.csv"
TARGETS = ("ascend910b2", "ascend950pr")
FIXED = ("mask_block", "row_block")  # a size, chosen; not fitted
NEAR = 0.03  # how much a constant's distance from its first value (in e-folds) counts as an error
OUTLIER = 0.15  # errors beyond count less than their square

Constants = dict[str, float]
Predict = Callable[[TableRow, Mapping[str, float]], float]


@dataclass(frozen=True)
class Fitted:
    """An op's rows on a chip, a fit to all of them, and each row's prediction left out."""

    op: str
    rows: tuple[TableRow, ...]
    constants: Constants
    predicted: tuple[float, ...]
    left_out: tuple[float, ...]

    def errors(self, left_out: bool = False) -> list[float]:
        """Relative errors, of the fit to all rows or of each row left out."""
        found = self.left_out if left_out else self.predicted
        return [us / row.us - 1 for us, row in zip(found, self.rows, strict=True) if row.us]


def rows_of(target: Target) -> dict[str, list[TableRow]]:
    """The published rows of a target's part, by family of ops."""
    found: dict[str, list[TableRow]] = {}
    names = {op: family for family, ops in FAMILIES.items() for op in ops}
    for row in read_rows(DATA, target.name).rows:
        found.setdefault(names.get(row.call.op, row.call.op), []).append(row)
    return found


def fit(rows: Sequence[TableRow], first: Mapping[str, float], predict: Predict) -> Constants:
    """Least squares of log errors over the constants' logarithms, outliers damped."""
    names = [name for name in first if name not in FIXED]
    start = np.log([first[name] for name in names])

    def residuals(x: np.ndarray) -> np.ndarray:
        c = dict(first) | dict(zip(names, np.exp(x), strict=True))
        errors = [np.log(predict(row, c) / row.us) for row in rows if row.us]
        # soft_l1 by hand, since nearness to the start is not to be damped
        damped = [
            np.sign(e) * OUTLIER * np.sqrt(2 * (np.hypot(1, e / OUTLIER) - 1)) for e in errors
        ]
        return np.array([*damped, *(NEAR * (x - start))])

    largest = [0.0 if name.endswith("exposed") else np.inf for name in names]  # log of a share
    solved = least_squares(residuals, start, diff_step=1e-3, max_nfev=60, bounds=(-np.inf, largest))
    return dict(first) | dict(zip(names, map(float, np.exp(solved.x)), strict=True))


def fitted(
    op: str, rows: Sequence[TableRow], first: Mapping[str, float], predict: Predict
) -> Fitted:
    """The fit to all rows, and to all but each."""
    constants = fit(rows, first, predict)
    left = []
    for row in rows:
        others = [other for other in rows if other is not row]
        left.append(predict(row, fit(others, first, predict) if others else first))
    found = tuple(predict(row, constants) for row in rows)
    return Fitted(op, tuple(rows), constants, found, tuple(left))


def model_of(op: str) -> OpModel | None:
    """The op's or family's model; None: the lowering's own, or none."""
    return MODELS.get(FAMILIES.get(op, (op,))[0])


def all_fits(target: Target, only: str | None = None) -> list[Fitted]:
    """Every op that has a model, or one alone, on a target."""
    found = []
    for op, rows in sorted(rows_of(target).items()):
        model = model_of(op)
        if model is None or only not in (None, op):
            continue

        def predict(row: TableRow, c: Mapping[str, float], model: OpModel = model) -> float:
            return model.price(row.call, target, c).total_us  # type: ignore[arg-type]

        first = dict(model.first) | FIRST.get((target.name, op), {})
        found.append(fitted(op, rows, first, predict))
    return found


@dataclass(frozen=True)
class MatmulKind:
    """A matmul of the lowering whose constants are those of the target, by these names."""

    op: str
    names: tuple[str, ...]


MATMUL_KINDS = (
    MatmulKind(
        "quant_matmul",
        (
            "int8_start_us",
            "int8_load_start_us",
            "int8_memory_gb_per_s",
            "int8_exposed",
            "epilogue_cycles",
            "unaligned_cube",
        ),
    ),
    MatmulKind(
        "weight_quant_batch_matmul",
        (
            "w8a16_start_us",
            "w8a16_load_start_us",
            "w8a16_memory_gb_per_s",
            "w8a16_dequantize_bytes_per_cycle",
            "w8a16_bfloat16_times",
            "w8a16_sum_cycles",
        ),
    ),
)


def matmul_fits(target: Target, only: str | None = None) -> list[Fitted]:
    """The quantized matmuls; their constants stand in the chip's file, written by hand."""
    found, rows = [], rows_of(target)
    for kind in MATMUL_KINDS:
        if only not in (None, kind.op):
            continue

        def predict(row: TableRow, c: Mapping[str, float]) -> float:
            return price(row.call, with_constants(target, **c)).total_us  # type: ignore[arg-type]

        fitted_here = (n for n in kind.names if target.constants[n].fitted)
        first = {name: target[name] for name in fitted_here}
        found.append(fitted(kind.op, rows[kind.op], first, predict))
    return found


# What fits start from where the chip is known to differ: its vector ops start sooner.
_SOON = {"start_us": 3.0, "row_cycles": 25.0}
FIRST: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("ascend910b2", "attention"): {"mask_block": 512, "start_us": 25, "head_us": 2.9},
    ("ascend910b2", "mla"): {"mask_block": 512},
    ("ascend910b2", "grouped_matmul_swiglu_quant"): {"start_us": 8, "layout_spill_gb_per_s": 260},
    **{
        ("ascend950pr", op): {k: v for k, v in _SOON.items() if k in m.first}
        for op, m in MODELS.items()
    },
    ("ascend950pr", "grouped_matmul_swiglu_quant"): {},
    ("ascend950pr", "attention"): {"start_us": 10.0},
    ("ascend950pr", "mla"): {"row_block": 64, "start_us": 50, "score_cycles": 70},
    ("ascend950pr", "mla_prolog"): {},
}


def summary(errors: Sequence[float]) -> str:
    """Median, 90th percentile and largest."""
    found = np.abs(errors)
    return f"{np.median(found):6.1%} {np.quantile(found, 0.9):6.1%} {found.max():6.1%}"


def main() -> None:
    """Print, or write the constants."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", action="store_true", help="print every row")
    parser.add_argument("--write", action="store_true", help="write the fitted constants")
    parser.add_argument("--op", help="one op alone")
    options = parser.parse_args()
    written: dict[str, dict[str, Constants]] = {}
    for name in TARGETS:
        target = find_target(name)
        print(f"{name:32} rows     fitted: median P90 largest     left out: median P90 largest")
        for found in (*all_fits(target, options.op), *matmul_fits(target, options.op)):
            if found.op not in {kind.op for kind in MATMUL_KINDS}:
                written.setdefault(target.kind, {})[found.op] = found.constants
            both = f"{summary(found.errors())}   {summary(found.errors(left_out=True))}"
            print(f"{found.op:32} {len(found.rows):4}   {both}")
            if options.rows:
                shown = {k: float(f"{v:.3g}") for k, v in found.constants.items()}
                print(f"    {shown}")
                pairs = zip(found.rows, found.errors(), found.errors(True), strict=True)
                print("   ", " ".join(f"{r.case}:{r.us:g}({a:+.0%},{b:+.0%})" for r, a, b in pairs))
    if options.write:
        write(written)


HEAD = '"""Constants of the models of ops; written by `python -m bench.op_times --write`."""'


def write(found: Mapping[str, Mapping[str, Constants]]) -> None:
    """The module of fitted constants, to three digits."""
    counts = {
        target.kind: {op: len(rows) for op, rows in sorted(rows_of(target).items())}
        for target in map(find_target, TARGETS)
    }
    parts = {
        target.kind: {
            "part": target.name,
            **{name: target[name] for name in ("vector_cores", "clock_mhz", "hbm_gb_per_s")},
        }
        for target in map(find_target, TARGETS)
    }
    rounded = {
        kind: {
            op: {name: float(f"{value:.3g}") for name, value in constants.items()}
            for op, constants in sorted(ops.items())
        }
        for kind, ops in found.items()
    }
    lines = [HEAD, "", "from __future__ import annotations", ""]
    lines += ["from collections.abc import Mapping", "from typing import Any", ""]
    lines.append(f"REFERENCE: Mapping[str, Mapping[str, Any]] = {json.dumps(parts)}")
    lines.append('"""The part of each chip that was timed, and what its rates go with."""')
    lines.append(f"ROWS: Mapping[str, Mapping[str, int]] = {json.dumps(counts)}")
    lines.append('"""How many times each op or family was fitted to."""')
    lines.append(f"FITTED: Mapping[str, Mapping[str, Mapping[str, float]]] = {json.dumps(rounded)}")
    path = ROOT / "lowering" / "ascend" / "op_times" / "fitted.py"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", str(path)], check=True)


if __name__ == "__main__":
    main()
