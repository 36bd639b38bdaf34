"""Quality of every built-in recipe on SmolLM2-135M: the README's table.

    python -m bench.accuracy [--windows 16] [--recipes w8a8 w4a16 ...] [--sampled] [--json FILE]

Calibrates on Python's language reference (16 windows of 512 tokens; with --sampled on sequences
sampled from the model itself) and evaluates on Wikipedia.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import panguq
from demo.fetch import default_cache, fetch_calibration_text, fetch_evaluation_text, fetch_model
from demo.run import windows_of
from panguq.evaluate import evaluate, logits_of, weight_figures
from panguq.report.progress import terminal_progress

RECIPES = ("w8a8", "w8a8-dynamic", "w8a16", "w4a16", "w4a16-asym")


def main() -> None:
    """Compile each recipe, evaluate all of them in one pass over the text, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cache = default_cache()
    folder = fetch_model(cache)
    model, tokenizer = panguq.load_pretrained(folder), panguq.load_tokenizer(folder)
    calibration = None
    if not arguments.sampled:
        calibration = windows_of(fetch_calibration_text(cache), tokenizer, 16)
    compiled: dict[str, Any] = {}
    for recipe in arguments.recipes:
        print(f"compiling {recipe}", file=sys.stderr)
        compiled[recipe] = panguq.compile(model, recipe, calibration=calibration)
    stages = {
        (recipe, stage): one.at_stage(stage)
        for recipe, one in compiled.items()
        for stage in ("fake-quant", "lowered")
    }
    windows = windows_of(fetch_evaluation_text(cache), tokenizer, arguments.windows)
    logits = {f"{recipe}/{stage}": logits_of(one) for (recipe, stage), one in stages.items()}
    results = evaluate(logits, windows, logits_of(model), progress=terminal_progress())
    print("| recipe | perplexity | above float | KL | top-1 | bits/weight | static / dynamic |")
    print("|---|---|---|---|---|---|---|")
    print(f"| float | {next(iter(results.values()))['float_perplexity']:.3f} | | | | 32 | |")
    for recipe, one in compiled.items():
        lowered, fake = results[f"{recipe}/lowered"], results[f"{recipe}/fake-quant"]
        base, figures = lowered["float_perplexity"], weight_figures(one)
        print(
            f"| `{recipe}` | {lowered['perplexity']:.3f} "
            f"| {100 * (lowered['perplexity'] / base - 1):+.2f} % "
            f"(fake-quant {100 * (fake['perplexity'] / base - 1):+.2f} %) "
            f"| {lowered['kl']:.4f} | {100 * lowered['top1']:.1f} % "
            f"| {figures['bits_per_weight']:.2f} "
            f"| {100 * figures['static_share']:.1f} / {100 * figures['dynamic_share']:.1f} % |"
        )
        results[f"{recipe}/lowered"] |= figures
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
