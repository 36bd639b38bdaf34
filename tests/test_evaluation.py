"""Metrics by hand, and collapsed models as results."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import panguq
from panguq.evaluation import (
    METRICS,
    Divergence,
    FloatPerplexity,
    Perplexity,
    TopOne,
    evaluate,
    first_broken_node,
    logits_of,
    weight_figures,
)
from panguq.ir.edit import get_tensor, set_tensor
from panguq.recipe import Recipe
from tests.model_shelf import make_model, token_ids

WINDOWS = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])


def table(rows: list[list[float]]):
    """A model of three tokens: what comes next depends on the last token alone."""
    probabilities = torch.tensor(rows)

    def logits(ids: Tensor) -> Tensor:
        return probabilities[ids].log() + 3.0  # logits need no normalization

    return logits


FLOAT = table([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])
OTHER = table([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]])


def test_perplexity_by_hand() -> None:
    """Six scored tokens: 0>1 1>2 2>1, 2>2 2>0 0>1; a window's first token is not scored."""
    result = evaluate({"it": FLOAT}, WINDOWS)["it"]
    scored = [0.25, 0.7, 0.3, 0.4, 0.3, 0.25]
    expected = math.exp(-sum(map(math.log, scored)) / 6)
    assert result == {"perplexity": pytest.approx(expected)}


def test_all_metrics_by_hand() -> None:
    result = evaluate({"it": OTHER}, WINDOWS, against=FLOAT)["it"]
    scored = [0.5, 0.8, 0.3, 0.3, 0.4, 0.5]
    assert result["perplexity"] == pytest.approx(math.exp(-sum(map(math.log, scored)) / 6))
    alone = evaluate({"it": FLOAT}, WINDOWS)["it"]["perplexity"]
    assert result["float_perplexity"] == pytest.approx(alone)
    from_0 = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    from_1 = 0.2 * math.log(0.2 / 0.1) + 0.7 * math.log(0.7 / 0.8)
    from_2 = 0.3 * math.log(0.3 / 0.4) + 0.4 * math.log(0.4 / 0.3)
    assert result["kl"] == pytest.approx((2 * from_0 + from_1 + 3 * from_2) / 6, rel=1e-5)
    assert result["top1"] == pytest.approx(1 / 6)  # only after token 1 do they agree


def test_a_model_against_itself() -> None:
    result = evaluate({"it": FLOAT}, WINDOWS, against=FLOAT)["it"]
    assert (result["kl"], result["top1"]) == (0.0, 1.0)
    assert result["perplexity"] == result["float_perplexity"]


def test_kl_is_of_the_float_model_from_the_compiled() -> None:
    forward, backward = (
        evaluate({"it": a}, WINDOWS, against=b)["it"]["kl"]
        for a, b in ((OTHER, FLOAT), (FLOAT, OTHER))
    )
    assert forward != pytest.approx(backward, rel=0.01)


def test_doubled_logits_are_noticed() -> None:
    result = evaluate({"it": lambda ids: 2 * FLOAT(ids)}, WINDOWS, against=FLOAT)["it"]
    assert result["kl"] > 0.01
    assert result["perplexity"] != pytest.approx(result["float_perplexity"], rel=1e-3)


def test_a_token_of_no_probability_costs_nothing_where_both_agree() -> None:
    """0 log 0 is 0, as in models that pad their vocabulary with -inf."""
    never = table([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    result = evaluate({"it": never}, torch.tensor([[0, 1, 0]]), against=never)["it"]
    assert result["kl"] == 0.0


def test_the_float_model_runs_once_a_window() -> None:
    calls = []

    def counted(ids: Tensor) -> Tensor:
        calls.append(ids)
        return FLOAT(ids)

    evaluate({"a": FLOAT, "b": OTHER, "c": OTHER}, WINDOWS, against=counted)
    assert [ids.shape for ids in calls] == [(1, 4), (1, 4)]


def test_the_registry() -> None:
    assert (Perplexity, FloatPerplexity, Divergence, TopOne) == METRICS
    names = [m.name for m in METRICS]
    assert names == ["perplexity", "float_perplexity", "kl", "top1"]
    chosen = evaluate({"it": FLOAT}, WINDOWS, against=OTHER, metrics=[TopOne])["it"]
    assert list(chosen) == ["top1"]


def test_a_real_models_perplexity_is_transformers() -> None:
    model, windows = make_model("llama"), token_ids(3, 20)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in windows]
    found = evaluate({"it": logits_of(model)}, windows)["it"]["perplexity"]
    assert found == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


# --- collapsed models ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_a_result(bad) -> None:
    broken = lambda ids: FLOAT(ids) * bad  # noqa: E731
    result = evaluate({"it": broken}, WINDOWS, against=FLOAT)["it"]
    assert math.isnan(result["perplexity"]) and math.isnan(result["kl"])
    assert 0.0 <= result["top1"] <= 1.0


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    def sure(ids: Tensor) -> Tensor:
        return torch.tensor([1e5, 0.0, 0.0]).expand(*ids.shape, 3)

    assert evaluate({"it": sure}, torch.tensor([[0, 1, 2]]))["it"]["perplexity"] == math.inf


def compiled_float(weight: str, value: float):
    model = panguq.compile(make_model("openpangu"), "float")
    tensor = get_tensor(model.graph, weight)
    set_tensor(model.graph, weight, torch.full_like(tensor, value))
    return model


@pytest.mark.parametrize(
    ("weight", "value", "broken"),
    [
        ("model.layers.1.mlp.up_proj.weight", math.inf, "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.1.self_attn.o_proj.bias", math.nan, "model.layers.1.self_attn.o_proj.bias"),
        ("model.layers.0.mlp.up_proj.weight", 3e38, "model.layers.0.mlp.up_proj:linear"),
        ("model.embed_tokens.weight", math.nan, "model.embed_tokens.weight"),
    ],
)
def test_the_first_broken_op_is_named(weight, value, broken) -> None:
    model, windows = compiled_float(weight, value), token_ids(2, 12)
    result = evaluate({"it": logits_of(model)}, windows)["it"]
    assert not math.isfinite(result["perplexity"])
    assert first_broken_node(model, windows) == broken


def test_a_model_of_zeros_is_a_result_without_a_culprit() -> None:
    """Collapsed, and finite: every token is as likely as any other."""
    model, windows = compiled_float("lm_head.weight", 0.0), token_ids(2, 12)
    result = evaluate({"it": logits_of(model)}, windows)["it"]
    assert result["perplexity"] == pytest.approx(96)
    assert first_broken_node(model, windows) is None


def test_a_sound_model_has_no_broken_op() -> None:
    model = panguq.compile(make_model("openpangu"), "w8a8", calibration=token_ids(4, 16))
    assert first_broken_node(model, token_ids(2, 12)) is None


# --- shares and bits ----------------------------------------------------------------------------


def figures(recipe: object) -> dict[str, float]:
    model = make_model("openpangu")
    return weight_figures(panguq.compile(model, recipe, calibration=token_ids(4, 16)))


def test_shares_by_hand() -> None:
    """Per layer q, o 64x64, k, v 32x64, gate, up 96x64, down 64x96: 30720 weights; down is 1/5."""
    recipe = Recipe(
        name="mixed", schemes={"*": "W8A8", "*.down_proj": "W8A8_DYNAMIC", "*.o_proj": "W8A16"},
        passes=("calibrate", "insert-fake-quant", "quantize-weights"),
    )  # fmt: skip
    found = figures(recipe)
    assert found["dynamic_share"] == pytest.approx(6144 / 30720)
    assert found["float_share"] == pytest.approx(4096 / 30720)
    assert found["static_share"] == pytest.approx(20480 / 30720)
    outputs = 64 + 32 + 32 + 64 + 96 + 96 + 64
    assert found["bits_per_weight"] == pytest.approx(8 * (30720 + 4 * outputs) / 30720)


def test_bits_of_float_and_of_4_bit_weights() -> None:
    assert figures("float") == {
        "bits_per_weight": 32.0, "static_share": 0.0, "dynamic_share": 0.0, "float_share": 1.0,
    }  # fmt: skip
    four = figures("w4a16")["bits_per_weight"]
    groups = (24576 // 64 + 6144 // 32) * 2  # k is 64, and 96 for down: groups of 64 and of 32
    assert four == pytest.approx(8 * (30720 / 2 + groups) / 30720)
