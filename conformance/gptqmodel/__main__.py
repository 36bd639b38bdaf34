"""Write GPTQ and AWQ checkpoints of a random model and have GPTQModel and transformers read them.

    python -m conformance.gptqmodel [--environment DIR] [--rows NAME ...]

Every weight must be panguq's exactly, after rounding to float16, in which the readers compute, and
logits as near as that allows (45 dB) to those of the fake-quant graph: the lowered one rounds to
bfloat16 in its kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import panguq
from conformance.compressed_tensors.checkpoints import openpangu_shaped, random_tokens
from conformance.environment import ROOT, TORCH, Unavailable
from conformance.gptqmodel import compare
from conformance.gptqmodel.environment import make_environment
from panguq.formats.checkpoint.graph import read_checkpoint_graph
from tests.model_folders import make_tokenizer

LEAST_DB = 45.0
PASSES = ["insert-fake-quant", "quantize-weights"]
# Format, and the scheme of all linears.
ROWS = {
    "gptq-w4": ("gptq", "W4A16-g64"),
    "gptq-w4-per-channel": ("gptq", "W4A16-per_channel"),
    "gptq-w4-asym": ("gptq", "W4A16_ASYM-g64"),
    "gptq-w8": ("gptq", "W8A16"),
    "gptq-w3": ("gptq", "W3A16-g64"),
    "gptq-w2": ("gptq", "W2A16-g64"),
    "awq-w4": ("awq", "W4A16-g64"),
    "awq-w4-asym": ("awq", "W4A16_ASYM-g64"),
}


def main() -> int:
    """0 if every reader agrees; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m conformance.gptqmodel")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-gptqmodel")
    parser.add_argument("--torch", default=TORCH, help="as pip wants it")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS, metavar="NAME")
    options = parser.parse_args()
    try:
        python = make_environment(options.environment, options.torch)
    except Unavailable as reason:
        print(f"skipped: {reason}")
        return 0
    failed = 0
    for name in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            _write(*ROWS[name], Path(folder))
            for how in ("gptqmodel", "transformers"):
                said = _compared(python, Path(folder), how)
                good = _is_good(said)
                failed += not good
                print(f"{'ok' if good else 'FAILED':6} {name}, {how}: {said}", flush=True)
    return 1 if failed else 0


def _write(form: str, scheme: str, folder: Path) -> None:
    recipe = {"schemes": {"*": scheme}, "passes": PASSES}
    model = openpangu_shaped().half()
    # GPTQModel loads no folder without a tokenizer.
    data = {"calibration": random_tokens(1, 16), "tokenizer": make_tokenizer()}
    compiled = panguq.compile(model, recipe, **data)
    compiled.save(folder / "checkpoint", format=form)
    ids = random_tokens(2, 64, 1)
    quantized = read_checkpoint_graph(compiled.artifact).quantized
    weights = {path: linear.dequantized(torch.float32) for path, linear in quantized.items()}
    with torch.no_grad():
        logits = compiled.at_stage("fake-quant")(ids).logits.float()
    save_file(weights | {"input_ids": ids, "logits": logits}, folder / "reference.safetensors")


def _compared(python: Path, folder: Path, how: str) -> dict[str, Any]:
    paths = (str(folder / "checkpoint"), str(folder / "reference.safetensors"))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "1"}
    command = (str(python), compare.__file__, *paths, how)
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"error": done.stderr.strip()[-300:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _is_good(said: dict[str, Any]) -> bool:
    if "error" in said or said["linears"] != said["wanted"]:
        return False
    return said.get("largest", 0.0) == 0.0 and bool(said["db"] >= LEAST_DB)


if __name__ == "__main__":
    sys.exit(main())
