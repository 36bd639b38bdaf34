"""A language model inside a vision wrapper is compiled as what it is, and the towers are named."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

import panguq
from tests.families.encoders import IMAGE
from tests.families.models import GROUPED, randomize

IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 4]])
TOWERS = "vision_tower (CLIPVisionModel), multi_modal_projector (LlavaMultiModalProjector)"
SECTIONS = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}


def llava() -> Any:
    text = dict(GROUPED, model_type="llama", pad_token_id=0)
    vision = dict(IMAGE, model_type="clip_vision_model")
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=250)
    return transformers.LlavaForConditionalGeneration(config).eval()


def qwen2_vl() -> Any:
    vision = dict(depth=1, embed_dim=32, hidden_size=128, num_heads=2, patch_size=4)
    text = dict(GROUPED, rope_parameters=SECTIONS)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def test_it_is_the_text_s_own_class(tmp_path) -> None:
    model = llava()
    randomize(model)
    compiled: Any = panguq.compile(model, "w8a8-dynamic", calibration=[IDS])
    assert f"left out: {TOWERS}" in compiled.report.warnings[0]
    assert compiled.config.architectures == ["LlamaForCausalLM"]
    with torch.no_grad():
        expected = model(IDS).logits
    assert (compiled(IDS).logits - expected).norm() / expected.norm() < 0.1
    compiled.save(tmp_path / "served", format="compressed-tensors")
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    model.save_pretrained(tmp_path / "model")
    assert f"left out: {TOWERS}" in panguq.plan(tmp_path / "model", "w8a8-dynamic").warnings[0]


def test_text_without_a_class_of_its_own_stays_in_the_wrapper(tmp_path) -> None:
    model = qwen2_vl()
    compiled: Any = panguq.compile(model, "float")
    assert "left out: model.visual (Qwen2VisionTransformer" in compiled.report.warnings[0]
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(panguq.PanguqError, match=r"the graph does not read model\.visual\."):
        compiled.save(tmp_path / "served", format="compressed-tensors")
