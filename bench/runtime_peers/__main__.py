"""Compare the speed of panguq's compiled models with that of other runtimes on the same machine.

    python -m bench.runtime_peers [--threads 1 2] [--rounds 5] [--models FOLDER ...]
        [--environments DIR] [--json FILE] [--write docs/cpu-target.md]

Every engine is a process of its own; all take turns, round by round. llama.cpp and OpenVINO GenAI
get virtual environments (llama.cpp is compiled: some ten minutes). `--models` are folders that
`compiled.save` wrote, measured as they run here: build them before. Without it, SmolLM2-135M is
compiled and built under the recipes of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import markdown_table, write_between_markers
from bench.runtime_peers.environments import LLAMA_CPP, OPENVINO, gguf_file, make_environment
from bench.runtime_peers.serve import DECODE_TOKENS, PAST_TOKENS, PREFILL_TOKENS
from conformance.environment import ROOT, Unavailable
from demo.fetch import default_cache, fetch_model

KINDS = ("prefill", "decode")
RECIPES = ("float", "w8a8-dynamic", "w4a16")
HEAD = "W8A16"
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True)
class Engine:
    """What is measured, and the command that measures it; the number of threads comes last."""

    name: str
    command: tuple[str, ...]


def main() -> None:
    """Measure, print, and write the table if asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.runtime_peers")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="*", type=Path)
    parser.add_argument("--environments", type=Path, default=ROOT)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help="a page with markers for the tables")
    options = parser.parse_args()
    engines = [*own_engines(options.models), *other_engines(options.environments)]
    found = {n: measure(engines, n, options.rounds) for n in options.threads}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    text = "\n\n".join([conditions(options.rounds), *(table(n, rows) for n, rows in found.items())])
    print(text)
    if options.write:
        write_between_markers(options.write, "runtime peers", text)


def own_engines(models: Sequence[Path] | None) -> list[Engine]:
    """The model as it is, in two types, and compiled models."""
    python = (sys.executable, "-m", "bench.runtime_peers.run_torch")
    source = fetch_model(default_cache())
    folders = models if models is not None else [compiled_model(name) for name in RECIPES]
    return [
        *(Engine(f"eager {t}", (*python, str(source), t)) for t in ("float32", "bfloat16")),
        *(Engine(f"panguq {f.name}", (*python, str(f.absolute()), "compiled")) for f in folders),
    ]


def compiled_model(recipe: str) -> Path:
    """SmolLM2 under a recipe, with its head in `HEAD` if it is quantized, compiled and built."""
    import panguq
    from bench.run import load

    folder = default_cache() / "runtime-peers" / recipe
    if not folder.exists():
        model, tokenizer, windows = load()
        chosen = panguq.Recipe.named(recipe)
        if recipe != "float":
            chosen = chosen.model_copy(update={"head": HEAD})
        made = panguq.compile(model, chosen, calibration=windows[:4], tokenizer=tokenizer)
        made.save(folder)
    report: Any = panguq.load(folder).build()  # type: ignore[operator]
    print(f"{recipe}: {report.libraries} libraries, {report.seconds:.0f} s", file=sys.stderr)
    return folder


def other_engines(environments: Path) -> list[Engine]:
    """llama.cpp and OpenVINO GenAI, each with 4 and 8 bits; what is not to be had is said."""
    engines = []
    try:
        llama_cpp = make_environment(LLAMA_CPP, environments)
        for kind in ("Q4_0", "Q8_0"):
            file = str(gguf_file(kind, default_cache(), llama_cpp))
            script = f"bench.runtime_peers.{LLAMA_CPP.script}"
            engines.append(Engine(f"llama.cpp {kind}", (str(llama_cpp), "-m", script, file)))
        openvino = make_environment(OPENVINO, environments)
        for kind in ("Q4_0", "Q8_0"):
            file = str(gguf_file(kind, default_cache(), llama_cpp))
            script = f"bench.runtime_peers.{OPENVINO.script}"
            engines.append(Engine(f"OpenVINO GenAI {kind}", (str(openvino), "-m", script, file)))
    except Unavailable as reason:
        print(f"not measured: {reason}", file=sys.stderr)
    return engines


def measure(
    engines: Sequence[Engine], threads: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each engine: the process's own with one thread, else of the wall."""
    clock = "cpu" if threads == 1 else "wall"
    running = {engine.name: _started(engine, threads) for engine in engines}
    found = {name: {kind: list[float]() for kind in KINDS} for name in running}
    for turn in range(1 + rounds):
        for kind in KINDS:
            for name, process in running.items():
                figure = _asked(process, kind)[clock]
                if turn:  # the first warms up
                    found[name][kind].append(figure)
    for process in running.values():
        process.communicate()
    return found


def _started(engine: Engine, threads: int) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*engine.command, str(threads)], env=variables, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _answer(process)
    return process


def _asked(process: subprocess.Popen[str], kind: str) -> Any:
    assert process.stdin is not None
    process.stdin.write(f"{kind}\n")
    process.stdin.flush()
    return _answer(process)


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended with {process.wait()}")
    return json.loads(line)


def conditions(rounds: int) -> str:
    """The machine and what was done, for the head of the tables."""
    from panguq.built.machine import cpu_features

    has = [name for name in _FEATURES if name in cpu_features()]
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "?")
    return (
        f"{model} with {', '.join(has)}; prompts of {PREFILL_TOKENS} tokens, decoding of "
        f"{DECODE_TOKENS} after {PAST_TOKENS}, medians (least to most) of {rounds} rounds in turn."
    )


def table(threads: int, rows: dict[str, dict[str, list[float]]]) -> str:
    """A Markdown table for one number of threads."""
    kind = "CPU ms" if threads == 1 else "ms of the wall"
    cells = ([name, *(_cell(values[kind]) for kind in KINDS)] for name, values in rows.items())
    head = [f"{threads} thread{'s' if threads > 1 else ''}, {kind}", "prefill", "a token"]
    return markdown_table(head, cells)


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
