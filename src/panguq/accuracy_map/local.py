"""The cells on this machine: as many processes as its memory allows by the plan's own forecast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from panguq.accuracy_map.folder import MapFolder
from panguq.accuracy_map.job import Job
from panguq.accuracy_map.worker import Told, work
from panguq.errors import PanguqError

SPARE = 0.9
"""Of the memory that is free, what the map may take."""


def cell_bytes(jobs: Sequence[Job]) -> int:
    """The peak of the largest compile among these, and the float model that it is compared with."""
    from panguq.planning.dry_run import plan

    peaks = [0]
    by_recipe = {job.recipe_key: job for job in jobs if not job.is_float}
    for job in by_recipe.values():
        try:
            found = plan(
                job.model, job.compiled_recipe, target=job.target, windows=job.windows,
                window=job.window, calibrated=job.calibration is not None,
            )  # fmt: skip
            peaks.append(found.peak_bytes + found.weight_bytes)
        except PanguqError:  # the cell itself will say why
            continue
    return max(peaks)


def free_bytes() -> int:
    """What /proc/meminfo calls available; 0 where there is no such file."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def processes_for(jobs: Sequence[Job], cores: int, free: int, forecast: int) -> int:
    """At least one, at most one a core, and no more than recipes with something to do."""
    recipes = len({job.recipe_key for job in jobs if not job.is_float})
    fit = int(SPARE * free // forecast) if forecast else cores
    return max(1, min(cores, fit, recipes))


def run_local(
    folder: MapFolder, jobs: Sequence[Job], *, keep: bool, processes: int | None, told: Told
) -> None:
    """Fill the map, in this process if one is enough.

    A process that dies takes no cell with it: what it held is begun again, three times at most.
    """
    pending = [job for job in jobs if not folder.has(job)]
    if processes is None:
        cores = len(os.sched_getaffinity(0))
        processes = 1
        if cores > 1 and len(pending) > 1:
            processes = processes_for(pending, cores, free_bytes(), cell_bytes(pending))
    if processes == 1 or not pending:
        work(folder, jobs, keep=keep, told=told)
        return
    _run_processes(folder, jobs, keep, processes, told)


def _run_processes(
    folder: MapFolder, jobs: Sequence[Job], keep: bool, processes: int, told: Told
) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    seen = {job.name for job in jobs if folder.has(job)}
    running: list[subprocess.Popen[bytes]] = []
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"keep": keep, "jobs": [job.as_json() for job in jobs]}, file)
        file.flush()
        command = [sys.executable, "-m", "panguq.accuracy_map.worker", str(folder.path), file.name]

        def start() -> subprocess.Popen[bytes]:
            with open(folder.path / "logs" / "workers.log", "ab") as log:
                return subprocess.Popen(command, env=variables, stdout=log, stderr=log)

        try:
            running = [start() for _ in range(processes)]
            while True:
                seen = _tell(folder, jobs, seen, told)
                if all(job.name in seen for job in jobs):
                    break
                for place, process in enumerate(running):
                    code = process.poll()
                    if code is not None and code > 0:
                        raise PanguqError(
                            f"a process of the map ended with status {code}",
                            f"{folder.path}/logs/workers.log says why",
                        )
                    if code is not None:  # killed, or it left what another one had begun
                        running[place] = start()
                time.sleep(0.3)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def _tell(folder: MapFolder, jobs: Sequence[Job], seen: set[str], told: Told) -> set[str]:
    new = [job for job in jobs if job.name not in seen and folder.has(job)]
    for job in new:
        told(folder.cell(job))
    return seen | {job.name for job in new}
