"""lm-evaluation-harness: its prompts, its filters and its metrics over rows of local files.

A task is lm-eval's own configuration file; only where its data comes from is changed, and what
`Task.changes` says. Code that a model wrote is never run by lm-eval.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panguq.errors import InputError
from panguq.extras import require
from panguq.tasks.data_folder import TaskRow
from panguq.tasks.rows import TaskRows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from panguq.tasks.task_list import Task

Sample = dict[str, Any]
SCORES = ("acc", "exact_match", "acc_norm", "f1", "em")
"""The first of these that a task has is its score."""


def version() -> str:
    """lm-eval's release. Raises InputError where it is not installed."""
    require("lm_eval", "a task other than perplexity")
    return metadata.version("lm-eval")


def config_folder() -> Path:
    """Where lm-eval's task files lie."""
    version()
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def run(task: Task, rows: Sequence[TaskRows], model: Any) -> list[Sample]:
    """lm-eval's samples of these rows, in their order: its documents, requests, answers, scores.

    model: an LM of lm-eval's (`panguq.tasks.language_model`).
    """
    version()
    samples: list[Sample] = []
    with quiet():
        from lm_eval.evaluator import evaluate

        tasks = {}
        for part in rows:
            name = f"{task.name}_{part.subject}" if part.subject else task.name
            tasks[name] = make(task, part)
        found = evaluate(model, tasks, bootstrap_iters=0, log_samples=True)
    for name in tasks:
        by_item = sorted(_first_filter(found["samples"][name]), key=lambda s: s["doc_id"])
        samples += by_item
    return samples


def make(task: Task, rows: TaskRows) -> Any:
    """lm-eval's task over these rows."""
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config=task_config(task, rows))


def task_config(task: Task, rows: TaskRows) -> dict[str, Any]:
    """lm-eval's configuration with the data replaced, and for code the metric left out."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = config_folder() / task.config.format(subject=rows.subject)
    config: dict[str, Any] = load_yaml(path, resolve_func=task.kind != "code")
    for key in ("dataset_path", "dataset_name", "dataset_kwargs", "tag", "group", "task_alias"):
        config.pop(key, None)
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    config |= {**splits, "custom_dataset": lambda **_: _dataset(rows), "num_fewshot": task.shots}
    if rows.shown:
        config |= {"fewshot_split": "shown", "fewshot_config": {"sampler": "first_n"}}
    if task.kind == "code":
        config |= {"unsafe_code": False, "metric_list": [{"metric": "bypass"}]}
        config.pop("filter_list", None)
        shown = config.get("fewshot_config")
        if shown and isinstance(shown.get("samples"), str):
            config["fewshot_config"] = {**shown, "samples": _literal(shown["samples"])}
    return config | dict(task.changes)


def score_of(sample: Sample) -> float:
    """A sample's score, of the metric that its task has first."""
    for name in SCORES:
        if name in sample:
            return float(sample[name])
    raise InputError(
        f"the task has none of the metrics {', '.join(SCORES)}", "it cannot be put on a map"
    )


def _dataset(rows: TaskRows) -> Any:
    from datasets import Dataset

    found = {"test": Dataset.from_list(rows.items)}
    if rows.shown:
        found["shown"] = Dataset.from_list(rows.shown)
    return found


def _first_filter(samples: Sequence[Sample]) -> Iterator[Sample]:
    """A task with several filters has a sample for each; the last one is the most lenient."""
    names = list(dict.fromkeys(sample.get("filter") for sample in samples))
    yield from (sample for sample in samples if sample.get("filter") == names[-1])


def _literal(function: str) -> list[TaskRow]:
    """What a function of lm-eval's file returns as a literal. The file itself is not imported: it
    would load the metric that runs code."""
    path, _, name = function.rpartition(".")
    tree = ast.parse(Path(path).with_suffix(".py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            last = node.body[-1]
            if isinstance(last, ast.Return) and last.value is not None:
                shown: list[TaskRow] = ast.literal_eval(last.value)
                return shown
    raise InputError(f"lm-eval's {function} is no list any more", "install the tested lm-eval")


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and datasets say nothing below an error meanwhile."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def limited(rows: Sequence[TaskRows], chosen: Callable[[int], Sequence[int]]) -> list[TaskRows]:
    """The rows whose number over all of them is in `chosen(how many)`, without empty subjects."""
    wanted = set(chosen(sum(len(part.items) for part in rows)))
    found, start = [], 0
    for part in rows:
        kept = [item for i, item in enumerate(part.items) if start + i in wanted]
        start += len(part.items)
        if kept:
            found.append(replace(part, items=kept))
    return found
