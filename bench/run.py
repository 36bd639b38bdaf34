"""Speed of compiled models against the float model, and what a compile costs.

    python -m bench.run [--threads N] [--repeats N] [--json FILE]

Prints ratios with minimum, median and maximum; the float32 eager model is the baseline, run in
turn with the others. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import panguq
from bench.speed import PREFILL_TOKENS, Timing, compare, decode_ms, prefill_ms
from demo.fetch import default_cache, fetch_calibration_text, fetch_model
from panguq.data.calibration import token_windows

RECIPES = ("float", "w8a8", "w8a8-dynamic", "w8a16", "w4a16")
BUILT = ("float", "w8a8-dynamic", "w4a16")


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description="Speed and compile cost on SmolLM2-135M.")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compile-cost", metavar="RECIPE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.compile_cost:
        print(json.dumps(compile_cost(arguments.compile_cost)))
        return
    with tempfile.TemporaryDirectory() as cache:  # built afresh, so that the build is timed
        os.environ["PANGUQ_CACHE"] = cache
        measured = speed(arguments.repeats)
    results = {**measured, "compile": all_compile_costs(arguments.threads)}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def load() -> tuple[Any, Any, torch.Tensor]:
    """The demo's model, tokenizer and 16 calibration windows of 512 tokens."""
    folder = fetch_model(default_cache())
    model, tokenizer = panguq.load_pretrained(folder), panguq.load_tokenizer(folder)
    text = fetch_calibration_text(default_cache()).read_text(encoding="utf-8")
    return model, tokenizer, token_windows(text, tokenizer, PREFILL_TOKENS, 16)


def speed(repeats: int) -> dict[str, Any]:
    """Prefill of 512 tokens and decoding at batch 1, for every recipe."""
    model, tokenizer, windows = load()
    print(f"{torch.get_num_threads()} threads, {repeats} repeats after one warm-up")
    models: dict[str, Any] = {
        "eager float32": model,
        "eager bfloat16": copy.deepcopy(model).to(torch.bfloat16),
    }
    for recipe in RECIPES:
        print(f"compiling {recipe}", file=sys.stderr)
        models[recipe] = panguq.compile(model, recipe, calibration=windows[:4], tokenizer=tokenizer)
        models[recipe](windows[:1, :2])  # it looks for built code now, and there is none
        if recipe in BUILT:
            models[f"{recipe} built"] = built(models[recipe])
    results = {}
    for title, measure in (
        (f"prefill of {PREFILL_TOKENS} tokens", prefill_ms),
        ("decode at batch 1, per token", decode_ms),
    ):
        timings = compare(models, "eager float32", measure, windows[:1], repeats)
        print(f"\n{title}: median (min-max), times faster than eager float32")
        for name, timing in timings.items():
            print(f"  {name:18s} {timing.render()}")
        own = compare_with(timings, "float")
        print("  against panguq's own float compile: " + ", ".join(own))
        results[title] = {name: _as_dict(timing) for name, timing in timings.items()}
    return results


def built(compiled: Any) -> Any:
    """The same compile with its code built, into the cache that this run was given."""
    made = copy.copy(compiled)
    report = made.build()
    print(f"  built: {report.libraries} libraries, {report.seconds:.0f} s", file=sys.stderr)
    return made


def compare_with(timings: dict[str, Timing], baseline: str) -> list[str]:
    """Median paired ratios against another of the models that ran."""
    base = timings[baseline].milliseconds
    lines = []
    for name, timing in timings.items():
        ratios = [b / x for b, x in zip(base, timing.milliseconds, strict=True)]
        if name not in (baseline, "eager float32"):
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            lines.append(f"{name} {middle:.2f}x ({low:.2f}-{high:.2f})")
    return lines


def _as_dict(timing: Timing) -> dict[str, Any]:
    return {"ms": timing.milliseconds, "ratio": timing.ratios}


def all_compile_costs(threads: int) -> dict[str, Any]:
    """Each recipe compiled in its own process, so that peak memory is its own."""
    print("\ncompile with 16 windows of 512 tokens, in units of one float forward over them")
    costs = {}
    for recipe in ("w8a8", "w8a8-dynamic", "w4a16"):
        command = [sys.executable, "-m", "bench.run", "--compile-cost", recipe]
        command += ["--threads", str(threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        costs[recipe] = cost = json.loads(output.splitlines()[-1])
        print(
            f"  {recipe:14s} {cost['ratio']:.2f}x forward ({cost['compile_s']:.1f} s without the "
            f"trace of {cost['trace_s']:.1f} s; forward {cost['forward_s']:.1f} s), peak memory "
            f"{cost['peak_mib']:.0f} MiB = float32 weights + {cost['above_weights_mib']:.0f} MiB"
        )
    return costs


def compile_cost(recipe: str) -> dict[str, float]:
    """Seconds of trace and compile against one forward pass, and the process's peak memory."""
    from panguq.ir.trace_causal_lm import trace_causal_lm

    model, tokenizer, windows = load()
    with torch.no_grad():
        model(windows[:1])
        started = time.perf_counter()
        for row in windows:
            model(row[None], use_cache=False)
        forward_s = time.perf_counter() - started
    started = time.perf_counter()
    trace_causal_lm(model)
    trace_s = time.perf_counter() - started
    started = time.perf_counter()
    panguq.compile(model, recipe, calibration=windows, tokenizer=tokenizer)
    compile_s = time.perf_counter() - started - trace_s
    peak_mib = peak_memory_mib()
    weights_mib = sum(p.numel() * 4 for p in model.parameters()) / 2**20
    return {
        "forward_s": forward_s,
        "trace_s": trace_s,
        "compile_s": compile_s,
        "ratio": compile_s / forward_s,
        "peak_mib": peak_mib,
        "above_weights_mib": peak_mib - weights_mib,
    }


def peak_memory_mib() -> float:
    """This process's largest resident memory, mapped weights included.

    From VmHWM, since getrusage's figure also holds what the parent had when it forked.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("the system does not tell peak memory in /proc/self/status")


if __name__ == "__main__":
    main()
