"""A compiled model as a folder for onnxruntime-genai: what it feeds, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import panguq
from panguq.cli import main
from panguq.errors import ExportError, StorageError
from panguq.formats.onnx.genai import export_genai
from tests.model_shelf import shared_model, token_ids


@pytest.fixture(scope="module")
def compiled() -> Any:
    return panguq.compile(shared_model("llama"), "w8a8-dynamic", calibration=token_ids(2, 8))


def test_genai_feeds_an_integer_mask_and_past_key_values(compiled: Any, tmp_path: Path) -> None:
    compiled.save(tmp_path / "model")
    command = ["export-onnx", str(tmp_path / "model"), "--for", "onnxruntime-genai"]
    assert main([*command, "--out", str(tmp_path / "genai")]) == 0
    config = json.loads((tmp_path / "genai" / "genai_config.json").read_text())["model"]
    assert config["decoder"]["inputs"]["past_key_names"] == "past_key_values.%d.key"
    session = onnxruntime.InferenceSession(str(tmp_path / "genai" / "model.onnx"))
    inputs = {entry.name: entry for entry in session.get_inputs()}
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs["attention_mask"].type == "tensor(int64)"

    ids = token_ids(1, 6)
    feeds = {
        "input_ids": ids.numpy(),
        "attention_mask": torch.ones_like(ids).numpy(),
        "position_ids": torch.arange(6)[None].numpy(),
    }
    for name, entry in inputs.items():
        if name.startswith("past_key_values."):
            feeds[name] = torch.zeros(1, entry.shape[1], 0, entry.shape[3]).numpy()
    logits, *cache = session.run(None, feeds)
    expected = compiled(ids).logits[:, -1:]
    assert torch.allclose(torch.from_numpy(logits), expected, atol=0.05)
    assert len(cache) == 2 * config["decoder"]["num_hidden_layers"]

    with pytest.raises(StorageError, match="already exists"):
        export_genai(compiled.artifact, tmp_path / "genai")


def test_a_cache_of_codes_is_refused(tmp_path: Path) -> None:
    ids = token_ids(2, 8)
    model = panguq.compile(shared_model("llama"), "w8a8-dynamic-kv8", calibration=ids)
    with pytest.raises(ExportError, match="layer 0 keeps no key and value in floats"):
        export_genai(model.artifact, tmp_path / "genai")
