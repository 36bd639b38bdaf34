"""`panguq eval --tasks`: one compiled model on tasks, beside the float model if that is given."""

from __future__ import annotations

import argparse
import os
from typing import Any

from panguq.cli.command import print_json, quiet_transformers
from panguq.errors import InputError


def run_tasks(options: argparse.Namespace, compiled: Any, tokenizer: Any) -> int:
    """Answer every task in every mode of thinking, and print the figures."""
    from panguq.models.hf import load_pretrained
    from panguq.report.progress import terminal_progress
    from panguq.tasks.find_task import find_task
    from panguq.tasks.language_model import Decoding, check_thinking
    from panguq.tasks.outcome import prepare_task

    tasks = [find_task(name, options.data) for name in dict.fromkeys(options.tasks)]
    modes = list(dict.fromkeys(options.thinking)) or [None]
    for mode in modes:
        check_thinking(tokenizer, mode)
    if options.thinking and not any(task.kind == "code" for task in tasks):
        raise InputError("--thinking is of tasks that write code", "ask for humaneval or mbpp")
    asked = []
    for task in tasks:
        for mode in modes if task.kind == "code" else [None]:
            drawn = task.kind == "code"
            decoding = Decoding(
                budget=options.max_new_tokens or task.budget or 1,
                temperature=options.temperature if drawn else 0.0,
                samples=options.samples if drawn else 1,
                seed=options.seed,
                batch=options.batch,
                thinking=mode,
            )
            asked.append((prepare_task(task, options.data, options.limit, decoding), decoding))
    model = None if options.against is None else load_pretrained(options.against)
    progress = terminal_progress()
    found = [
        _figures(prepared, decoding, compiled, model, tokenizer, options, progress)
        for prepared, decoding in asked
    ]
    if options.json:
        print_json(found)
    else:
        print("\n\n".join(_text(figures) for figures in found))
    return 0


def prepare_process() -> None:
    """No bars of libraries, which hide panguq's; read when tqdm is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    quiet_transformers()


def _figures(
    prepared: Any,
    decoding: Any,
    compiled: Any,
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    progress: Any,
) -> dict[str, Any]:
    from panguq.tasks.outcome import evaluate_task
    from panguq.tasks.verdict import compared, item_figures, status_of

    def answered(which: Any) -> Any:
        return evaluate_task(
            prepared, which, tokenizer, decoding, options.limit,
            unsafe=options.unsafe, progress=progress,
        )  # fmt: skip

    task, outcome = prepared.task, answered(compiled)
    figures: dict[str, Any] = {"task": task.name, "protocol": prepared.protocol}
    figures |= {"thinking": decoding.thinking, "seed": options.seed, "limit": options.limit}
    figures |= item_figures(task, outcome.items)
    if model is None:
        return figures
    floats = answered(model)
    own = item_figures(task, floats.items)
    figures |= compared(task, floats.items, outcome.items)
    figures["status"], figures["reason"] = status_of(task, figures, own, None)
    if task.is_generated and own["tokens_mean"]:
        figures["inflation"] = figures["tokens_mean"] / own["tokens_mean"]
    return figures


def _text(figures: dict[str, Any]) -> str:
    lines = []
    for name, value in figures.items():
        if value is not None and value != {}:
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            lines.append(f"{name:17} {shown}")
    return "\n".join(lines)
