"""SmolLM2-135M: every stage of a W8A8 and a W4A16 compile exports, is valid, and runs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

import panguq
from panguq.data.calibration import token_windows
from panguq.data.inputs import prepare
from panguq.decibels import sqnr_db
from panguq.dumps.reader import DumpReader
from panguq.formats.onnx.export import export_dump
from panguq.formats.onnx.run import OnnxModel
from panguq.ir.edit import label
from tests import smollm2
from tests.formats.onnx.onnx_values import is_matmul, local_differences, perplexities_with_onnx

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize(("recipe", "layers"), [("w8a8", smollm2.OUTLIER_LAYERS), ("w4a16", 4)])
def test_every_stage_exports_and_runs(recipe: str, layers: int, tmp_path: Path) -> None:
    model, tokenizer, text = smollm2.load(layers)
    calibration = token_windows(text[:100_000], tokenizer, 64, 1)
    dump = tmp_path / "dump"
    compiled = panguq.compile(model, recipe, calibration=calibration, dump_dir=dump)
    ids, float_logits = token_windows(text[300_000:], tokenizer, 24, 1), None
    reader = DumpReader(dump)
    path = tmp_path / "model.onnx"
    quantized = False
    for stage in reader.stages:
        export_dump(reader, path, stage, overwrite=True)
        onnx.checker.check_model(str(path))
        logits, cache = OnnxModel(path, compiled.interface).logits(ids)
        assert len(cache) == 2 * layers and cache[0].shape == (1, 3, 24, 64)
        float_logits = logits if float_logits is None else float_logits
        quantized |= any(word in stage for word in ("quant", "outliers", "lower"))
        assert sqnr_db(float_logits, logits) >= (5 if quantized else 60), stage
    differences = local_differences(
        compiled.graph, compiled.interface, path, prepare(compiled.interface, ids)
    )
    matmuls = [label(node) for node in compiled.graph.graph.nodes if is_matmul(node)]
    assert len(matmuls) >= 7 * layers + 1
    assert min(differences[name] for name in matmuls) >= 60


def test_the_whole_model_keeps_its_perplexity(tmp_path: Path) -> None:
    """W4A16; tests/test_real_model.py asks the same of W8A8."""
    model, tokenizer, text = smollm2.load()
    calibration = token_windows(text[:100_000], tokenizer, 64, 1)
    compiled = panguq.compile(model, "w4a16", calibration=calibration)
    held_out = token_windows(text[300_000:], tokenizer, 128, 2)
    perplexity = perplexities_with_onnx(compiled, tmp_path, held_out)
    assert perplexity["onnx"] == pytest.approx(perplexity["pytorch"], rel=0.01)
