"""`panguq eval`: how good a compiled model is on a text."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from panguq.cli.accuracy_map import add_answers
from panguq.cli.command import (
    Commands,
    add_command,
    add_json,
    counted,
    print_json,
    text_windows,
    tokens,
)
from panguq.cli.evaluate_tasks import prepare_process, run_tasks
from panguq.errors import InputError

_TEXT = "text, or a .jsonl, .json or .parquet file of texts or conversations"
STAGES = ("lowered", "fake-quant", "float")


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "eval",
        run,
        "Measure perplexity, and KL divergence and top-1 agreement with the float model. The text "
        "is cut into windows that do not overlap; the first token of each is not scored. With "
        "--tasks instead of --text it answers tasks, and --against gives the paired difference.",
        "panguq eval smollm2-w8a8 --against smollm2 --text book.txt --windows 16 --json",
    )
    command.add_argument("compiled", metavar="COMPILED_DIR", type=Path, help="a compiled model")
    command.add_argument(
        "--against", metavar="MODEL_DIR", type=Path, help="the float model's folder"
    )
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", type=Path, help=_TEXT)
    what.add_argument("--tasks", metavar="TASK", nargs="+", help="docs/map.md lists them")
    command.add_argument("--data", metavar="DIR", type=Path, help="the sets that the tasks read")
    add_answers(command)
    command.add_argument(
        "--chat",
        action="store_true",
        help='each line is a conversation, {"messages": [{"role": …, "content": …}]}, whatever the '
        "file's name; all are written in the model's chat format",
    )
    command.add_argument("--window", type=tokens, default=512, help="tokens in a window")
    command.add_argument("--windows", type=counted, default=16, help="how many windows at most")
    command.add_argument("--stage", choices=STAGES, default="lowered", help="which graph to run")
    add_json(command)


def run(options: argparse.Namespace) -> int:
    """Evaluate and print."""
    prepare_process()
    if options.tasks is None and options.against is None:
        raise InputError("--text is compared with the float model", "name its folder: --against")
    from panguq.compiled_model import load
    from panguq.models.hf import load_pretrained

    is_float = options.stage == "float"
    compiled: Any = load(options.compiled, "lowered" if is_float else options.stage)
    if compiled.interface.kind != "causal_lm":
        raise InputError(
            f"{options.compiled}: no model that continues text, of which alone there is perplexity",
            "its report.json compares it with the float model (end_to_end)",
        )
    tokenizer = _tokenizer(options, compiled)
    if options.tasks is not None:
        if is_float:
            raise InputError("--stage float has no tasks of its own", "--against answers them, too")
        return run_tasks(options, compiled, tokenizer)
    what = "conversations" if options.chat else "a text"
    sizes = (options.window, options.windows)
    windows = text_windows(options.text, what, tokenizer, *sizes, options.chat)
    model = load_pretrained(options.against)
    result = figures_of(compiled, model, windows, is_float)
    if options.json:
        print_json(result)
    else:
        print(_table(result))
    return 0


def figures_of(compiled: Any, model: Any, windows: Any, is_float: bool = False) -> dict[str, Any]:
    """All figures of a compiled model, or with `is_float` of the float model itself.

    A model that is not finite is a result, too: its figures are not, and `first_broken` names the
    first op that yields NaN or Inf, or, where perplexity is ten times the float model's, the first
    matmul below 5 dB of local SQNR.
    """
    from panguq.evaluation import (
        COLLAPSED,
        evaluate,
        first_broken_node,
        logits_of,
        weight_figures,
        worst_matmul,
    )
    from panguq.report.progress import terminal_progress

    reference = logits_of(model)
    measured = reference if is_float else logits_of(compiled)
    figures: dict[str, Any] = dict(
        evaluate({"it": measured}, windows, reference, progress=terminal_progress())["it"]
    )
    if is_float:
        bits = 8.0 * model.dtype.itemsize
        shares = {"static_share": 0.0, "dynamic_share": 0.0, "float_share": 1.0}
        figures |= {"bits_per_weight": bits, **shares}
    else:
        figures |= weight_figures(compiled)
    figures |= {"stage": "float" if is_float else compiled.stage}
    figures |= {"windows": len(windows), "window": windows.shape[1]}
    if not math.isfinite(figures["perplexity"]):
        figures["first_broken"] = None if is_float else first_broken_node(compiled, windows)
    elif not is_float and figures["perplexity"] > COLLAPSED * figures["float_perplexity"]:
        figures["first_broken"] = worst_matmul(compiled)
    return figures


def _tokenizer(options: argparse.Namespace, compiled: Any) -> Any:
    from panguq.models.hf import load_tokenizer

    if options.against is None:
        if compiled.tokenizer is None:
            raise InputError(
                f"{options.compiled}: the model was saved without a tokenizer",
                "name the float model's folder, which has one: --against",
            )
        return compiled.tokenizer
    try:
        return load_tokenizer(options.against)
    except InputError:
        if compiled.tokenizer is not None:
            return compiled.tokenizer
        raise


def _table(result: dict[str, Any]) -> str:
    lines = []
    for name, value in result.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        lines.append(f"{name:17} {shown}")
    return "\n".join(lines)
