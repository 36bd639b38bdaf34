"""A target of the same kind whose constants fit timed matmuls best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from panguq.errors import LoweringError
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.tuning.timings import MatmulTiming
from panguq.lowering.known_targets import is_path
from panguq.lowering.measured import Measured
from panguq.lowering.target import Constant, Target

MOST_SHAPES = 400
_ALSO = ("hbm_gb_per_s",)
_HOLDING = 0.1
"""What a constant's change by a factor e weighs against one row's error of as much."""


@dataclass(frozen=True)
class TimedRow:
    """A timed matmul with the predictions before and after the fit; what was measured is used."""

    timing: MatmulTiming
    before_us: float
    fitted_us: float

    @property
    def error(self) -> float:
        """Of the fitted constants alone: fitted over measured, less one."""
        return self.fitted_us / self.timing.us - 1


@dataclass(frozen=True)
class OpFit:
    """The target, which constants were fitted (name to value before), and every row."""

    target: AscendMachine
    changed: dict[str, float]
    rows: tuple[TimedRow, ...]


def fit_to_timings(base: Target, timings: Sequence[MatmulTiming], name: str, source: str) -> OpFit:
    """Fit the constants that are fitted ones in `base`, and memory's rate, to the timings.

    Least squares of log(predicted / measured), each constant held to its value in `base` by a tenth
    of a row's weight; one that no row depends on keeps it. The rows themselves go into the target's
    `measured`. Raises LoweringError if no row is one that the target has a kernel for.
    """
    if not isinstance(base, AscendMachine):
        raise LoweringError(
            f"target {base.name}: op times are fitted for Ascend targets alone",
            "give --target ascend910b2",
        )
    base = replace(base, measured=())
    kept = [t for t in timings if _legal(t, base)]
    if not kept:
        raise LoweringError(
            "no row is a matmul that the target has a kernel for",
            "profile a model in float16 or bfloat16, or one in W8A8, W8A16 or W4A16",
        )
    kept = kept if len(kept) <= MOST_SHAPES else [kept[i * len(kept) // MOST_SHAPES]
                                                  for i in range(MOST_SHAPES)]  # fmt: skip
    measured = np.array([t.us for t in kept])
    names = [n for n, c in base.constants.items() if c.fitted or n in _ALSO]
    start = np.array([base[n] for n in names])
    before = _predicted(base, kept)
    moved = [
        np.abs(_predicted(_with(base, {n: 1.1 * v}), kept) / before - 1).max()
        for n, v in zip(names, start, strict=True)
    ]
    free = [i for i, change in enumerate(moved) if change > 1e-3]

    def errors(logs: Any) -> Any:
        values = {names[i]: start[i] * float(np.exp(x)) for i, x in zip(free, logs, strict=True)}
        rows = np.log(_predicted(_with(base, values), kept) / measured)
        return np.concatenate([rows, _HOLDING * logs])

    found = np.zeros(len(free))
    if free:
        found = least_squares(
            errors, found, loss="soft_l1", f_scale=0.2, diff_step=0.02, bounds=(-2.5, 2.5),
            max_nfev=40,
        ).x  # fmt: skip
    values = {
        names[i]: float(f"{start[i] * np.exp(x):.4g}") for i, x in zip(free, found, strict=True)
    }
    fitted = _with(base, values, f"fitted to {len(kept)} matmuls of {source}")
    after = _predicted(fitted, kept)
    rows = tuple(
        TimedRow(t, float(b), float(a)) for t, b, a in zip(kept, before, after, strict=True)
    )
    entries = tuple(_measured(t) for t in kept)
    target = replace(fitted, name=name, measured=entries)
    return OpFit(target, {n: base[n] for n in values}, rows)


def check_new_name(name: str, taken: Sequence[str]) -> None:
    """Raises LoweringError for a name that a target file must not have."""
    if not name or is_path(name) or name in taken:
        raise LoweringError(
            f"{name!r} is no name for a new target", "name the file otherwise, as in mine.yaml"
        )


def _legal(timing: MatmulTiming, target: AscendMachine) -> bool:
    return any(
        c.kernel == timing.kernel and c.refusal is None for c in target.candidates(timing.problem)
    )


def _with(target: AscendMachine, values: dict[str, float], source: str = "") -> AscendMachine:
    changed = {
        name: Constant(value, target.constants[name].unit, source or target.constants[name].source)
        for name, value in values.items()
    }
    return replace(target, constants={**target.constants, **changed})


def _predicted(target: AscendMachine, timings: Sequence[MatmulTiming]) -> Any:
    found = []
    for timing in timings:
        candidates = [c for c in target.candidates(timing.problem) if c.kernel == timing.kernel]
        m = np.array([timing.problem.m])
        found.append(float(target.total_us(candidates, timing.problem, m).min()))
    return np.array(found)


def _measured(timing: MatmulTiming) -> Measured:
    problem = timing.problem
    assert problem.m is not None
    return Measured(
        timing.kernel,
        problem.m,
        problem.n,
        problem.k,
        problem.scheme.name,
        problem.dtype,
        problem.weight_format,
        timing.us,
    )


def summary(found: OpFit, fitted: bool) -> tuple[float, float]:
    """The median and the largest relative error, with the fitted constants or those before."""
    sizes = [
        abs((row.fitted_us if fitted else row.before_us) / row.timing.us - 1) for row in found.rows
    ]
    return float(np.median(sizes)), float(np.max(sizes))
