"""A process that fills a map: it takes cells that nobody has until there are none.

python -m panguq.accuracy_map.worker MAP_DIR JOBS_FILE
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from panguq.accuracy_map.folder import Cell, MapFolder
from panguq.accuracy_map.job import Job
from panguq.accuracy_map.measure import Models, make_cell

Told = Callable[[Cell], None]


def work(
    folder: MapFolder,
    jobs: Sequence[Job],
    *,
    keep: bool = False,
    told: Told = lambda _: None,
    only: str | None = None,
) -> None:
    """Make every cell that is not there, or the one that is named, unless another process does.

    A cell waits for float's cell of the same task. `jobs` are all cells of the map that is asked
    for: a compiled model goes when the last of its recipe's is done.
    """
    models = Models(folder)
    pending = [job for job in jobs if not folder.has(job) and only in (None, job.name)]
    order = {job.name: place for place, job in enumerate(jobs)}
    while pending:
        done = 0
        for job in pending:
            if not job.is_float and not folder.has(job.float_job):
                continue
            with folder.lock(job.name) as held:
                if held and not folder.has(job):
                    cell = make_cell(folder, job, models, order[job.name])
                    folder.list_cells()
                    told(cell)
                    done += 1
            if not keep:
                drop_if_last(folder, job, jobs)
        pending = [job for job in pending if not folder.has(job)]
        if pending and not done:
            time.sleep(0.5)


def drop_if_last(folder: MapFolder, job: Job, jobs: Sequence[Job]) -> None:
    """Delete the recipe's compiled model if all of its cells are done and nobody uses it.

    Whoever made its last cell may have been stopped before this; so it is called at the end, too.
    """
    same = [other for other in jobs if other.recipe_key == job.recipe_key]
    if job.is_float or not all(folder.has(other) for other in same):
        return
    with folder.lock(f"compiled-{job.recipe_key}") as held:
        if held:
            folder.drop_compiled(job)


def fill_map() -> int:
    """The process."""
    folder = MapFolder.existing(Path(sys.argv[1]))
    given = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    work(folder, [Job(**job) for job in given["jobs"]], keep=given["keep"])
    return 0


if __name__ == "__main__":
    sys.exit(fill_map())
