"""`precision`: what a float32 model multiplies in on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import panguq
from panguq.built.bodies import bodies
from panguq.decibels import sqnr_db
from panguq.errors import RecipeError
from panguq.ir.ops.canonical import attention
from panguq.kernels.cpu import multiplying
from panguq.kernels.cpu.bfloat16_float import FEW_QUERIES, bfloat16_attention, bfloat16_linear
from panguq.kernels.cpu.dequantized_linear import dequantized_linear
from panguq.recipe import Recipe

IDS = torch.arange(40).reshape(1, 40)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    return panguq.compile(LlamaForCausalLM(LlamaConfig(**sizes)).eval(), "float")


def at(model: Any, precision: str) -> Any:
    made = model.at_stage("lowered")
    made.recipe = made.recipe.model_copy(update={"precision": precision})
    return made


def targets(model: Any) -> list[Any]:
    return [node.target for node in model.executable.graph.nodes]


def test_float_matmuls_and_attention_are_rounded_only_where_that_is_asked_for(model: Any) -> None:
    exact, rounded = at(model, "float32"), at(model, "bfloat16")
    assert bfloat16_linear not in targets(exact) and attention in targets(exact)
    assert targets(rounded).count(bfloat16_linear) == 8 and attention not in targets(rounded)
    assert torch.ops.aten.linear.default not in targets(rounded)
    wanted, found = exact(IDS).logits, rounded(IDS).logits
    assert found.dtype == torch.float32 and not torch.equal(found, wanted)
    assert 35 < sqnr_db(wanted, found) < 80
    assert rounded.generate(IDS[:, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize("faster", [True, False])
def test_auto_follows_the_machine(
    faster: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiplying, "bfloat16_is_faster", lambda: faster)
    monkeypatch.setattr(multiplying, "float32_is_faster", lambda: not faster)
    assert Recipe.named("float").precision == "auto"
    assert (bfloat16_linear in targets(at(model, "auto"))) == faster
    x, codes, scale = torch.randn(9, 32), torch.randint(-8, 8, (8, 32)).char(), torch.rand(8, 1)
    weight_only = (x, codes, scale, None, 32, None)
    exact = dequantized_linear(*weight_only, torch.float32)
    found = dequantized_linear(*weight_only, torch.bfloat16)
    assert torch.equal(found, exact) != faster
    assert sqnr_db(found, bodies(few=False)[dequantized_linear](*weight_only, torch.bfloat16)) > 60


@pytest.mark.parametrize("seq", [FEW_QUERIES, FEW_QUERIES + 1])
def test_only_many_queries_are_rounded(seq: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, seq, 8) for heads in (4, 2, 2))
    mask = torch.zeros(1, 1, seq, seq).masked_fill(torch.rand(seq, seq) > 0.8, -1e9)
    for hidden in (mask, torch.empty(0, dtype=torch.bool), None):
        wanted = attention(query, key, value, hidden, 0.3)
        found = bfloat16_attention(query, key, value, hidden, 0.3)
        assert torch.equal(found, wanted) == (seq <= FEW_QUERIES)
        assert sqnr_db(wanted, found) > 40


@pytest.mark.parametrize("float_seconds", [0.5, 2.0])
def test_the_faster_type_is_measured(float_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.bfloat16: 1.0, torch.float32: float_seconds}
    monkeypatch.setattr(multiplying, "_seconds", seconds.__getitem__)
    assert multiplying.measured_dtype() == (torch.float32 if float_seconds < 1 else torch.bfloat16)
    assert multiplying.multiplying_dtype(torch.float32) == torch.float32


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(RecipeError, match="precision = 'float16'"):
        Recipe.of({"schemes": {"*": "FLOAT"}, "precision": "float16"})
