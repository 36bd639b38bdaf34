"""Compare panguq's compressed-tensors checkpoints in two pairs of releases.

    python -m conformance.compressed_tensors [--environment DIR] [--model tiny|smollm2|all]

Checkpoints and references are written by this Python, which has panguq; it is also the newer pair.
The older pair gets an environment of its own. SmolLM2 needs the demo's packages (`panguq[demo]`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from conformance.compressed_tensors import checkpoints, compare
from conformance.compressed_tensors.environment import ROOT, Unavailable, make_environment
from conformance.compressed_tensors.reference import write_reference
from panguq.formats.checkpoint.compressed_tensors import save_compressed_tensors


def main() -> int:
    """0 if everything that a release pair is to take agrees; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m conformance.compressed_tensors")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-ct13")
    parser.add_argument("--torch", default="torch==2.13.0", help="as pip wants it")
    parser.add_argument("--model", choices=("tiny", "smollm2", "all"), default="tiny")
    parser.add_argument("--rows", nargs="*", default=[], help="names; all without them")
    parser.add_argument("--without-older", action="store_true", help="only this Python")
    options = parser.parse_args()
    pairs = {_pair(): Path(sys.executable)}
    if not options.without_older:
        try:
            older = make_environment(options.environment, options.torch)
            pairs["transformers 4.57.6, compressed-tensors 0.13.0"] = older
        except Unavailable as reason:
            print(f"the older releases are skipped: {reason}")
    failed = passed = 0
    for model in ("tiny", "smollm2") if options.model == "all" else (options.model,):
        for row in checkpoints.rows(options.rows):
            with tempfile.TemporaryDirectory() as folder:
                _write(model, row, Path(folder))
                for pair, python in pairs.items():
                    for mode, figures in _compare(python, Path(folder)).items():
                        good = _report(f"{model} {row.name}", row.refused, pair, mode, figures)
                        passed, failed = passed + good, failed + (not good)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def _pair() -> str:
    versions = (importlib.metadata.version(n) for n in ("transformers", "compressed-tensors"))
    return "transformers {}, compressed-tensors {}".format(*versions)


def _write(model: str, row: checkpoints.Row, folder: Path) -> None:
    if model == "smollm2":
        source, calibration, ids = checkpoints.smollm2()
    else:
        source = checkpoints.openpangu_shaped()
        calibration, ids = checkpoints.random_tokens(4, 64), checkpoints.random_tokens(2, 256, 1)
    compiled = checkpoints.compile_row(row, source, calibration)
    save_compressed_tensors(compiled.artifact, folder / "checkpoint")
    write_reference(compiled, ids, folder / "reference.safetensors")


def _report(
    what: str, refused: tuple[str, ...], pair: str, mode: str, figures: dict[str, Any]
) -> bool:
    how = f"{pair.split()[1].partition('.')[0]} {mode}"
    known = how in refused or f"{what.split()[0]} {how}" in refused
    if "error" in figures:
        verdict = "as known" if known else "FAILED"
        said = figures["error"]
    else:
        wrong = compare.problems(figures)
        verdict = "as known" if wrong and known else "FAILED" if wrong else "ok"
        said = "; ".join(wrong) or _figures(figures)
    print(f"{verdict:9} {what}, {pair}, {mode}: {said}", flush=True)
    return verdict != "FAILED"


def _figures(figures: dict[str, Any]) -> str:
    return (
        f"{figures['linears']} weights equal; worst linear {figures['quantized_db']:.0f} dB on "
        f"quantized input, {figures['raw_db']:.0f} dB by the loader's rounding, "
        f"{figures['raw_panguq_db']:.0f} dB by panguq's; perplexity "
        f"{figures['perplexity']:.4f} ({figures['perplexity_change']:+.3%})"
        f"{'' if figures['rounds'] else ', activations left float'}"
    )


def _compare(python: Path, folder: Path) -> dict[str, dict[str, Any]]:
    paths = [str(folder / "checkpoint"), str(folder / "reference.safetensors")]
    command = [str(python), compare.__file__, *paths]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"every mode": {"error": done.stderr.strip()[-300:]}}
    figures: dict[str, dict[str, Any]] = json.loads(lines[-1])
    return figures


if __name__ == "__main__":
    sys.exit(main())
