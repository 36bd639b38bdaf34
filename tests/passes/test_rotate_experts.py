"""rotate in mixtures of experts: routers, shared experts and every expert turn with the stream."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import panguq
from panguq.errors import NumericsError
from panguq.ir.edit import clone, find_label, get_tensor, label, weights_of
from panguq.ir.properties import TRACED, Property
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import PassContext
from panguq.passes.rotate import Rotate
from panguq.passes.rotation.matrices import random_rotation
from panguq.passes.rotation.weights import WeightPlan
from panguq.tensors.weight_store import WeightStore
from tests.families.models import make
from tests.families.sweep import CALIBRATION
from tests.model_shelf import EXPERTS, canonical, make_model, run_pipeline, token_ids
from tests.passes.test_rotate import rotated, rows
from tests.shared_traces import shared_traces

LAYER = "model.layers.1.mlp."


def test_biases_of_experts_and_weights_that_are_stored_transposed() -> None:
    before, interface = trace_causal_lm(make("gpt_oss"))
    ctx = PassContext(interface, WeightStore())
    Canonicalize().run(before, ctx)
    after = clone(before)
    passes = [AssignSchemes(schemes=(("*", "W4A4"),)), Rotate(online=("down",))]
    record = run_pipeline(after, passes, ctx, held=TRACED | {Property.CANONICAL})[0][-1]
    assert {row["kind"] for row in rows(record.result)} >= {"residual", "down"}
    assert record.proved_difference is not None and record.proved_difference < 2**-22
    bias = LAYER + "experts.down_proj_bias"
    assert not torch.equal(weights_of(before)[bias], weights_of(after)[bias])


def test_weights_by_hand() -> None:
    """Norm into router and experts, every expert's rows and columns."""
    old = weights_of(canonical(EXPERTS)[0])
    gm, result = rotated(EXPERTS, Rotate(online=("down",)))
    stream = random_rotation(64, torch.Generator().manual_seed(0)).dense()
    gain = old["model.layers.1.post_attention_layernorm.weight"].double()
    factors = [
        get_tensor(gm, f"rotate.down_32_32_float32_{side}").double() for side in ("left", "right")
    ]
    inner = torch.kron(factors[0].T.contiguous(), factors[1])
    expected = {
        "gate.weight": old[LAYER + "gate.weight"] * gain @ stream,
        "experts.gate_up_proj": old[LAYER + "experts.gate_up_proj"] * gain @ stream,
        "experts.down_proj": stream.T
        @ old[LAYER + "experts.down_proj"].double()
        @ torch.linalg.inv(inner).T,
    }
    for name, tensor in expected.items():
        assert torch.allclose(weights_of(gm)[LAYER + name].double(), tensor, rtol=0, atol=1e-6)
    added = [row for row in rows(result) if row["kind"] == "down"]
    assert [(row["size"], row["readers"]) for row in added] == [(32, 1)] * 2
    down = find_label(gm, LAYER + "experts.down_proj:expert_linear")
    assert label(down.args[0]) == LAYER + "experts:swiglu.rotated"


@pytest.mark.parametrize("forgotten", ["mlp.gate", "experts.gate_up_proj", "experts.down_proj"])
def test_a_forgotten_weight_is_caught(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = WeightPlan.turn

    def forgetful(plan: WeightPlan, found, rotation) -> None:
        if forgotten not in found.weight:
            turn(plan, found, rotation)

    monkeypatch.setattr(WeightPlan, "turn", forgetful)
    with pytest.raises(NumericsError, match="in float64; rounding explains at most"):
        rotated(EXPERTS, Rotate())


def equal_scores() -> nn.Module:
    """Two experts that the router cannot tell apart: rounding alone chooses between them."""
    model = make_model(EXPERTS)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[1] = layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[0, 0] *= 1 + 2**-22
    return model


def test_the_proof_does_not_depend_on_a_choice_between_equal_scores() -> None:
    recipe = {
        "schemes": {"*": "W8A16"},
        "passes": ["rotate", "insert-fake-quant", "quantize-weights"],
    }
    panguq.compile(equal_scores(), recipe, calibration=token_ids(2, 32))


def test_four_bit_activations_with_outliers_need_the_rotation() -> None:
    """What experts read has outlier channels here, which leave the others one step each."""
    model = make("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[:3] *= 30
            layer.mlp.experts.gate_up_proj[..., :3] /= 30
            layer.mlp.gate.weight[:, :3] /= 30
    passes = ["insert-fake-quant", "quantize-weights"]
    with shared_traces():
        plain, turned = (
            panguq.compile(
                model, {"schemes": {"*": "W4A4"}, "passes": p}, calibration=CALIBRATION
            ).report
            for p in (passes, [{"rotate": {"online": ["down"]}}, *passes])
        )
    assert turned.quantized_share > 0.95
    name = "model.layers.0.mlp.experts.2.gate_up_proj:linear"
    before, after = (
        next(row for row in report.matmuls if row.name == name) for report in (plain, turned)
    )
    assert before.scheme == after.scheme == "W4A4"
    assert after.local_sqnr_db > before.local_sqnr_db + 10


@pytest.mark.parametrize("recipe", ["rotate", {"smoothquant": {"sites": ["norm_linear"]}}])
def test_a_router_that_computes_in_float32_takes_part(recipe) -> None:
    """DeepSeek's, which chooses among groups, casts its bfloat16 weight: the stored one changes."""
    passes = [recipe, "insert-fake-quant", "quantize-weights"]
    model = make("deepseek_v3-moe", first_k_dense_replace=0, num_hidden_layers=1).bfloat16()
    given = {"schemes": {"*": "W8A8_DYNAMIC"}, "passes": passes}
    compiled = panguq.compile(model, given, calibration=CALIBRATION)
    name = "model.layers.0.mlp.gate.weight"
    gate = weights_of(compiled.graph)[name]
    assert gate.dtype == torch.bfloat16 and not torch.equal(gate, model.state_dict()[name])
    assert compiled.report.logits_sqnr_db > 20
