"""From what the user asked for to the map's jobs: every mistake is found before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from panguq.accuracy_map.job import FLOAT, Job, model_hash
from panguq.errors import InputError, RecipeError
from panguq.files.checksums import sha256_of
from panguq.models.openpangu.chat import Thinking
from panguq.recipe import Recipe
from panguq.tasks.find_task import find_task
from panguq.tasks.language_model import check_thinking
from panguq.tasks.outcome import prepare_task
from panguq.tasks.sandbox import sandbox_tool
from panguq.tasks.task_list import Task


@dataclass(frozen=True)
class Asked:
    """What `panguq map` was told; see its options."""

    model: Path
    recipes: Sequence[str]
    tasks: Sequence[str]
    data: Path | None = None
    target: str = "cpu"
    calibration: Path | None = None
    windows: int = 16
    window: int = 512
    sampled: int = 0
    limit: int | None = None
    seed: int = 0
    thinking: Sequence[Thinking] = ()
    max_new_tokens: int | None = None
    temperature: float = 0.0
    samples: int = 1
    batch: int = 8
    unsafe: bool = False


def jobs_of(asked: Asked, command: str = "") -> list[Job]:
    """Float's cells first, then recipe by recipe, in the order that was asked for.

    Raises InputError and RecipeError for an unknown recipe or task, data that is missing or another
    than published, a model that cannot chat, and code tasks where there is no sandbox.
    """
    tasks = [find_task(name, asked.data) for name in dict.fromkeys(asked.tasks)]
    recipes = [Recipe.of(name) for name in dict.fromkeys(asked.recipes) if name != FLOAT]
    names = [recipe.name for recipe in recipes]
    twice = {name for name in names if names.count(name) > 1 or name == FLOAT}
    if twice:
        raise RecipeError(
            f"two recipes are called {', '.join(sorted(twice))}", "give each a name of its own"
        )
    sha256 = model_hash(asked.model)
    if asked.samples > 1 and asked.temperature <= 0:
        raise InputError("several greedy samples are one", "give --temperature, 0.2 or 0.8")
    if not asked.unsafe and any(task.kind == "code" for task in tasks):
        sandbox_tool()
    if asked.thinking:
        _check_chat(asked, tasks)
    calibration = None if asked.calibration is None else asked.calibration.resolve()
    columns = [
        _float_job(asked, task, mode, sha256, command)
        for task in tasks
        for mode in (asked.thinking if task.kind == "code" and asked.thinking else (None,))
    ]
    return columns + [
        _of_recipe(asked, column, recipe, calibration) for recipe in recipes for column in columns
    ]


def _check_chat(asked: Asked, tasks: Sequence[Task]) -> None:
    from panguq.models.hf import load_tokenizer

    if not any(task.kind == "code" for task in tasks):
        raise InputError("--thinking is of tasks that write code", "ask for humaneval or mbpp")
    tokenizer = load_tokenizer(asked.model)
    for mode in asked.thinking:
        check_thinking(tokenizer, mode)


def _float_job(asked: Asked, task: Task, mode: Thinking | None, sha256: str, command: str) -> Job:
    budget = (asked.max_new_tokens or task.budget or 1) if task.is_generated else 1
    # What a task of one answer does not read is not part of its cell.
    drawn = task.kind == "code"
    job = Job(
        str(asked.model.resolve()), sha256, FLOAT, "", task.name, "",
        None if asked.data is None else str(asked.data.resolve()),
        windows=0, window=0, limit=asked.limit, seed=asked.seed, thinking=mode, budget=budget,
        temperature=asked.temperature if drawn else 0.0, samples=asked.samples if drawn else 1,
        batch=asked.batch, unsafe=asked.unsafe, command=command,
    )  # fmt: skip
    protocol = prepare_task(task, asked.data, asked.limit, job.decoding).protocol
    return replace(job, protocol=protocol)


def _of_recipe(asked: Asked, column: Job, recipe: Recipe, calibration: Path | None) -> Job:
    return replace(
        column,
        recipe=recipe.name,
        recipe_text=recipe.to_yaml(),
        target=asked.target,
        calibration=None if calibration is None else str(calibration),
        calibration_sha256="" if calibration is None else sha256_of(calibration),
        windows=asked.windows,
        window=asked.window,
        sampled=asked.sampled,
    )
