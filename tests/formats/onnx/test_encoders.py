"""Encoders as ONNX files: onnxruntime computes what the compiled model does, padding included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import panguq
from tests.families.encoder_sweep import inputs_of
from tests.families.encoders import make_encoder


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("BertForSequenceClassification", "w8a8"),
        ("Qwen3Model", "w8a8-dynamic"),
        ("CLIPVisionModelWithProjection", "float"),
        ("WhisperEncoder", "float"),
    ],
)
def test_onnxruntime_agrees(kind: str, recipe: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make_encoder(kind)
    data = [inputs_of(model, 14, seed) for seed in (2, 3)]
    compiled = panguq.compile(model, recipe, calibration=data)
    compiled.export_onnx(tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    inputs = inputs_of(model, 9)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, :3] = inputs["attention_mask"][1, -2:] = 0
    given = {name: inputs[name].numpy() for name in (x.name for x in session.get_inputs())}
    expected = compiled(**inputs)
    for name, value in zip(compiled.interface.outputs, session.run(None, given), strict=True):
        difference = (expected[name] - torch.from_numpy(value)).abs().max()
        assert difference <= 1e-5 * expected[name].abs().max(), name
