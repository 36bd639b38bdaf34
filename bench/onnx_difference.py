"""Exported SmolLM2 in onnxruntime: how far it is from PyTorch, with and without optimizations.

    python -m bench.onnx_difference [RECIPE ...]

Prints the SQNR of the logits against the same graph in PyTorch, the perplexity, and the largest
difference of a logit. onnxruntime's default optimizations fuse some dequantized weights and the
matmul that reads them into a kernel that quantizes the activations.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import panguq
from demo.fetch import default_cache, fetch_calibration_text, fetch_model
from panguq.data.calibration import token_windows
from panguq.decibels import sqnr_db
from panguq.evaluation import Perplexity, evaluate, logits_of
from panguq.formats.onnx.export import export_onnx
from panguq.formats.onnx.run import OnnxModel

WINDOW, WINDOWS = 128, 4


def main(recipes: list[str]) -> None:
    """Compile, export and compare each recipe."""
    folder = fetch_model(default_cache())
    text = fetch_calibration_text(default_cache()).read_text(encoding="utf-8")
    tokenizer, model = panguq.load_tokenizer(folder), panguq.load_pretrained(folder)
    calibration = token_windows(text[:100_000], tokenizer, WINDOW, 2)
    held_out = token_windows(text[300_000:], tokenizer, WINDOW, WINDOWS)
    print("recipe         stage       run           sqnr_db  largest  perplexity")
    for recipe in recipes:
        compiled = panguq.compile(model, recipe, calibration=calibration)
        for stage in compiled.stages:
            compare(compiled.at_stage(stage), recipe, held_out)


def compare(compiled: Any, recipe: str, windows: torch.Tensor) -> None:
    """One line for each way of running the stage."""
    in_pytorch = logits_of(compiled)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(compiled.artifact, path, compiled.stage)
        runs: dict[str, Any] = {"pytorch": in_pytorch}
        for name, optimized in (("onnx", False), ("onnx optimized", True)):
            found = OnnxModel(path, compiled.interface, optimized)
            runs[name] = lambda ids, found=found: found.logits(ids)[0]
        results = evaluate(runs, windows, metrics=[Perplexity])
        expected = in_pytorch(windows[:1])
        for name, logits in runs.items():
            given = logits(windows[:1])
            largest = float((given - expected).abs().max())
            print(
                f"{recipe:14} {compiled.stage:11} {name:14} {sqnr_db(expected, given):6.1f} "
                f"{largest:8.4f} {results[name]['perplexity']:11.4f}",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] or ["float", "w8a8", "w8a8-dynamic", "w4a16", "w4a16-asym", "w8a16"])
