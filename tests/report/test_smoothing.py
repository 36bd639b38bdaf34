"""A recipe that asks for SmoothQuant and can move nothing says so."""

from __future__ import annotations

import torch
import transformers

import panguq
from tests.model_shelf import GROUPED, make_model, token_ids

SAID = (
    "smoothquant finds no site of kind norm_linear in this model and moves nothing: inputs are "
    "rounded as they are"
)


def test_a_model_without_sites() -> None:
    """OLMo 2 has its norms behind its linears."""
    torch.manual_seed(0)
    model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**GROUPED)).eval()
    recipe = "w8a8-dynamic-serving"
    assert panguq.plan(model, recipe).warnings == (SAID,)
    compiled = panguq.compile(model, recipe, calibration=token_ids(2, 8))
    assert SAID in compiled.report.warnings
    assert panguq.plan(model, "w8a16").warnings == ()


def test_a_model_with_sites() -> None:
    assert panguq.plan(make_model("llama"), "w8a8-dynamic-serving").warnings == ()
