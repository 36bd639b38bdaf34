"""A task by its name: one of panguq's list, or any of lm-eval's whose data is there."""

from __future__ import annotations

import functools
from pathlib import Path

from panguq.errors import InputError
from panguq.suggest import did_you_mean
from panguq.tasks.data_folder import json_rows
from panguq.tasks.harness import quiet, version
from panguq.tasks.rows import TaskRows
from panguq.tasks.task_list import TASKS, Task, TaskKind


def find_task(name: str, folder: Path | None = None) -> Task:
    """The task of this name, or lm-eval's own of it, whose rows are NAME.jsonl in `folder`.

    Raises InputError for a name that neither has.
    """
    if name in TASKS:
        return TASKS[name]
    # lm-eval takes seconds to list its tasks: only for one whose data is there.
    has_data = folder is not None and (folder / f"{name}.jsonl").exists()
    found = own_task(name) if has_data else None
    if found is None:
        raise InputError(
            f"unknown task {name!r}",
            f"{did_you_mean(name, TASKS, 'tasks')}; any other of lm-eval's by its name, with "
            f"{name[:60]}.jsonl in --data in the fields that it reads",
        )
    return found


def own_task(name: str) -> Task | None:
    """A task that only lm-eval has: its rows lie in NAME.jsonl, in the fields that it reads."""
    path = _own_tasks().get(name)
    if path is None:
        return None
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path, resolve_func=False)
    if config.get("unsafe_code"):
        raise InputError(
            f"the task {name} runs code in lm-eval's own process", "it is not run here"
        )
    kind: TaskKind = (
        "text" if config.get("output_type", "generate_until") == "generate_until" else "choice"
    )
    shots = int(config.get("num_fewshot") or 0)

    def read(file: Path) -> list[TaskRows]:
        rows = json_rows(file)
        return [TaskRows(rows[shots:], rows[:shots])]

    return Task(name, kind, f"{name}.jsonl", str(path), read, shots=shots, budget=256)


@functools.cache
def _own_tasks() -> dict[str, Path]:
    version()
    with quiet():
        from lm_eval.tasks import TaskManager

        index = TaskManager().task_index
    return {name: entry.yaml_path for name, entry in index.items()
            if entry.yaml_path is not None and entry.kind.name == "TASK"}  # fmt: skip
