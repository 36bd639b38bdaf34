"""The cells on a Ray cluster: every cell is a task, with the memory that the plan forecasts.

The folder is the one that everything else uses, on a disk that all machines of the cluster see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from panguq.accuracy_map.folder import MapFolder
from panguq.accuracy_map.job import Job
from panguq.accuracy_map.local import cell_bytes
from panguq.accuracy_map.worker import Told, work
from panguq.errors import InputError
from panguq.extras import require

RETRIES = 3
"""How often Ray starts a cell again whose worker died."""


def run_on_ray(
    folder: MapFolder, jobs: Sequence[Job], *, keep: bool, address: str | None, told: Told
) -> None:
    """Fill the map. Raises InputError for a cluster that is not there, or holds no cell."""
    require("ray", "--on ray", "leave it out: --on local uses this machine")
    import ray

    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}",
                "start one with `ray start --head`, or leave --ray-address out",
            ) from None
    try:
        _run(ray, folder, jobs, keep, told)
    finally:
        if ours:
            ray.shutdown()


def _run(ray: Any, folder: MapFolder, jobs: Sequence[Job], keep: bool, told: Told) -> None:
    pending = [job for job in jobs if not folder.has(job)]
    needed = resources(pending, ray.cluster_resources(), cell_bytes(pending))
    cell = ray.remote(_cell).options(max_retries=RETRIES, **needed)
    given = [job.as_json() for job in jobs]
    path = str(folder.path.resolve())
    waiting: dict[Any, Job] = {}
    floats: dict[str, Any] = {}
    for job in pending:
        before = floats.get(job.float_job.name)  # Ray starts a task when what it is given is there
        task = cell.remote(path, job.name, given, keep, before)
        waiting[task] = job
        if job.is_float:
            floats[job.name] = task
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1)
        job = waiting.pop(done[0])
        try:
            ray.get(done[0])
        except ray.exceptions.RayError as error:
            if not folder.has(job):
                _failed(folder, job, jobs.index(job), str(error).splitlines()[0])
        told(folder.cell(job))
    folder.list_cells()


def resources(jobs: Sequence[Job], cluster: dict[str, float], forecast: int) -> dict[str, Any]:
    """What a cell asks Ray for: memory by the plan, one core, and an NPU where the target is an
    Ascend and the cluster has any.

    Raises InputError where the forecast is more than the whole cluster has.
    """
    memory = int(cluster.get("memory", 0))
    if memory and forecast > memory:
        raise InputError(
            f"a cell takes about {forecast >> 20} MiB, the cluster has {memory >> 20} MiB",
            "take a larger cluster or a smaller model",
        )
    found: dict[str, Any] = {"num_cpus": 1, "memory": forecast}
    if any(job.target.startswith("ascend") for job in jobs) and cluster.get("NPU", 0) >= 1:
        found["resources"] = {"NPU": 1}
    return found


def _cell(path: str, name: str, given: list[dict[str, Any]], keep: bool, after: Any) -> str:
    """A Ray task: make one cell, unless it is there."""
    from pathlib import Path

    jobs = [Job(**job) for job in given]
    work(MapFolder.existing(Path(path)), jobs, keep=keep, only=name)
    return name


def _failed(folder: MapFolder, job: Job, order: int, reason: str) -> None:
    cell = {"name": job.name, "order": order, "recipe": job.recipe, "task": job.task}
    cell |= {"model": job.model_sha256[:16], "protocol": job.protocol, "seed": job.seed}
    cell |= {"limit": job.limit, "thinking": job.thinking, "command": job.command}
    folder.finish(job.name, cell | {"status": "failed", "reason": reason})
