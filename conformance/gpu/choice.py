"""The schedule that a fitted cost model takes on a GPU against the one that is faster there.

The model is that of Ascend targets with this GPU's cores, clock and cache, its fitted constants
fitted by what `panguq tune --from` uses, to every second timed shape and judged on the others. A
GPU has no vector cores apart from its own and no L1 of half a MiB, so that the model may fit badly;
how badly is what this says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from conformance.gpu.schedules import GROUP, Row
from panguq.ir.quant_spec import parse_scheme
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.tuning.fit import fit_to_timings
from panguq.lowering.ascend.tuning.timings import MatmulTiming
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.target import Constant
from panguq.lowering.targets import find_target

KERNELS = ("w4a16_data_parallel", "w4a16_split_k")


def gpu_target(cores: int, clock_mhz: float, l2_bytes: int) -> AscendMachine:
    """What the fit starts from: Ascend 910B1 with the sizes that CUDA says of the GPU."""
    base = find_target("ascend910b1")
    assert isinstance(base, AscendMachine)
    sizes = {"cube_cores": cores, "vector_cores": 2 * cores, "clock_mhz": clock_mhz,
             "l2_mib": l2_bytes / 2**20}  # fmt: skip
    known = {
        name: Constant(value, base.constants[name].unit, "CUDA's device properties")
        for name, value in sizes.items()
    }
    return replace(base, name="gpu", constants={**base.constants, **known})


def judge(rows: Sequence[Row], start: AscendMachine) -> dict[str, Any]:
    """How often the fitted model takes the faster schedule of the shapes that it has not seen, and
    what its choices cost: `regret` is the time of the schedule taken over that of the faster one,
    less one. Empty for fewer than four rows."""
    seen, unseen = rows[::2], rows[1::2]
    if len(rows) < 4:
        return {}
    timings = [t for row in seen for t in _timings(row)]
    fit = fit_to_timings(start, timings, "gpu-tuned", "this GPU")
    target = replace(fit.target, measured=())  # rules are judged, not what was looked up
    right, regret, errors = 0, [], []
    for row in unseen:
        predicted = [_predicted_us(target, timing) for timing in _timings(row)]
        measured = [row.data_parallel_us, row.split_k_us]
        taken = int(np.argmin(predicted))
        right += taken == int(np.argmin(measured))
        regret.append(measured[taken] / min(measured) - 1)
        errors += [p / us - 1 for p, us in zip(predicted, measured, strict=True)]
    return {
        "fitted_to": len(seen),
        "judged_on": len(unseen),
        "constants": {name: target[name] for name in fit.changed},
        "right": right,
        "median_regret": median(regret),
        "largest_regret": max(regret),
        "median_error": median(abs(error) for error in errors),
    }


def _timings(row: Row) -> list[MatmulTiming]:
    """The row's fastest kernel of either schedule, as `panguq tune` would read it."""
    problem = MatmulProblem(row.m, row.n, row.k, parse_scheme(f"W4A16-g{GROUP}"), dtype="float16")
    times = (row.data_parallel_us, row.split_k_us)
    return [MatmulTiming(k, k, problem, us, 1) for k, us in zip(KERNELS, times, strict=True)]


def _predicted_us(target: AscendMachine, timing: MatmulTiming) -> float:
    found = [c for c in target.candidates(timing.problem) if c.kernel == timing.kernel]
    legal = [c for c in found if c.refusal is None]
    return float(target.total_us(legal, timing.problem, np.array([timing.problem.m])).min())
