"""`--require 'humaneval >= 90%'`: what every recipe must keep of the float model's value."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from panguq.accuracy_map.folder import Cell, MapFolder
from panguq.accuracy_map.job import Job
from panguq.errors import InputError
from panguq.suggest import did_you_mean
from panguq.tasks.statistics import RESAMPLES, SEED, exp_mean, mean

_FORM = re.compile(r"\s*([\w.+-]+)\s*(>=|<=)\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True)
class Requirement:
    """A task's value must be at least, or with `<=` at most, this share of float's."""

    task: str
    at_least: bool
    share: float

    def __str__(self) -> str:
        return f"{self.task} {'>=' if self.at_least else '<='} {self.share:.4g}%"


def parse_requirement(text: str, tasks: Sequence[str]) -> Requirement:
    """Raises InputError for what is no requirement, or is of a task that is not on the map."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise InputError(f"--require {text!r}", "write it as 'humaneval >= 90%', in % of float's")
    task, sign, share = found.groups()
    if task not in tasks:
        raise InputError(f"--require {text!r}: no such task", did_you_mean(task, tasks, "tasks"))
    return Requirement(task, sign == ">=", float(share))


def shortfalls(folder: MapFolder, jobs: Sequence[Job], wanted: Requirement) -> list[str]:
    """A sentence for each recipe that falls short; the share is judged, its interval is said."""
    found = []
    for job in jobs:
        if job.is_float or job.task != wanted.task:
            continue
        said = _falls_short(folder, job, wanted)
        if said:
            mode = f" ({job.thinking})" if job.thinking else ""
            found.append(f"{job.recipe} falls short of {wanted}{mode}: {said}")
    return found


def _falls_short(folder: MapFolder, job: Job, wanted: Requirement) -> str | None:
    cell = folder.cell(job)
    value, floats = cell.get("value"), cell.get("float_value")
    if value is None or floats is None:
        return f"{cell['status']}, {cell['reason']}"
    if floats == 0:
        return "float's own value is 0, of which there is no share"
    share = 100 * value / floats
    if share >= wanted.share if wanted.at_least else share <= wanted.share:
        return None
    low, high = share_interval(folder, job, cell)
    return f"it has {share:.1f} % of float's {floats:.4g} (95 % interval {low:.1f} to {high:.1f} %)"


def share_interval(folder: MapFolder, job: Job, cell: Cell) -> tuple[float, float]:
    """The 95 % bootstrap interval of value / float's, in percent, items resampled in pairs."""
    x, y = (
        np.asarray([item["score"] for item in folder.items(name)], float)
        for name in (job.float_job.name, cell["name"])
    )
    value = exp_mean if cell["kind"] == "perplexity" else mean
    chosen = np.random.default_rng(SEED).integers(0, len(x), (RESAMPLES, len(x)))
    floats, own = value(x[chosen]), value(y[chosen])
    shares = 100 * np.divide(own, floats, out=np.full_like(own, math.inf), where=floats > 0)
    low, high = np.quantile(shares, [0.025, 0.975], method="nearest")
    return float(low), float(high)
