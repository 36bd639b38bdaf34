"""A folder of Gemma for servers stores w of the gain 1 + w, whatever was smoothed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import panguq
from tests.families.models import make
from tests.families.sweep import CALIBRATION, IDS

FAMILY = "gemma3_text"


@functools.cache
def compiled() -> Any:
    return panguq.compile(
        make(FAMILY), "w8a8-dynamic-serving", calibration=CALIBRATION, dtype=torch.bfloat16
    )


@pytest.mark.parametrize(
    ("format", "stem", "scale"),
    [
        ("compressed-tensors", "model", "weight_scale"),
        ("ascend", "quant_model_weights", "weight_scale"),
    ],
)
def test_transformers_computes_what_was_compiled(format, stem, scale, tmp_path) -> None:
    """With the folder's norms and dequantized weights, and activations that are not quantized."""
    compiled().save(tmp_path / "out", format=format)
    stored = load_file(tmp_path / "out" / f"{stem}.safetensors")
    model = make(FAMILY)
    names = dict(model.named_parameters())
    with torch.no_grad():
        expected = model(IDS).logits
        moved = []
        for name, parameter in names.items():
            if name not in stored:
                assert name == "lm_head.weight"  # tied
                continue
            tensor, scales = stored[name], stored.get(f"{name.removesuffix('weight')}{scale}")
            if scales is not None:
                tensor = tensor.float() * scales.float().view(-1, 1)
            elif "layernorm" in name and (tensor.float() - parameter).abs().max() > 0.05:
                moved.append(name.split(".")[3])
            parameter.copy_(tensor)
        actual = model(IDS).logits
    assert sorted(set(moved)) == ["input_layernorm", "pre_feedforward_layernorm"]
    noise = (actual - expected).square().mean() / expected.square().mean()
    assert -10 * torch.log10(noise) > 25
