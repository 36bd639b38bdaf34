"""rotate: the same function in float64, what it unties, what it adds, and what it is good for."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

import panguq
from panguq.errors import NumericsError, RecipeError
from panguq.ir.edit import clone, find_label, get_tensor, label, weights_of
from panguq.ir.run.interpret import run
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import Pass, PassContext, PassResult
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.rotate import Rotate
from panguq.passes.rotation.matrices import random_rotation
from panguq.passes.rotation.online import OnlineRotation
from panguq.passes.rotation.weights import WeightPlan
from panguq.passes.smoothquant import SmoothQuant
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import (
    CONFIGS,
    EXPERTS,
    FAMILIES,
    canonical,
    family_context,
    make_model,
    run_passes,
    tiny_context,
    token_ids,
    trace_tiny,
)

aten = torch.ops.aten
ONLINE = ("down", "heads")


def rotated(family: str, *passes: Pass, seed: int = 0) -> tuple[fx.GraphModule, PassResult]:
    """The family's graph after these passes, proofs and checks included, and the first's result."""
    gm, _ = canonical(family)
    ctx = replace(family_context(family), seed=seed)
    return gm, run_passes(gm, ctx, "W4A4", *passes)[2].result


def rows(result: PassResult, table: str = "rotations") -> list[dict[str, object]]:
    found = result.tables[table]
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


# --- the function stays the same ----------------------------------------------------------------


@functools.cache
def _in_float64(family: str) -> tuple[fx.GraphModule, PassContext]:
    gm, interface = trace_causal_lm(make_model(family).double())
    ctx = PassContext(interface, WeightStore())
    Canonicalize().run(gm, ctx)  # the model's own modules would round to float32 in between
    return gm, ctx


def batch(ctx: PassContext, ids: Tensor, caches: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Inputs for `ids` after what `caches` hold; of layers without a past where there are none."""
    interface, (sequences, tokens) = ctx.interface, ids.shape
    past = caches[0].shape[2] if caches else 0
    empty = [
        torch.zeros(sequences, layer.heads, 0, size, dtype=torch.float64)
        for layer in interface.cache
        for size in (layer.key_dim, layer.value_dim)
    ]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(sequences, 1, tokens, past + tokens).tril(past).bool(),
        "position_ids": torch.arange(past, past + tokens).expand(sequences, tokens),
        "logit_positions": torch.arange(tokens),
        **dict(zip(interface.inputs[4:], caches or empty, strict=True)),
    }


@pytest.mark.parametrize(
    ("family", "online"),
    [
        *((family, ONLINE) for family in (*FAMILIES, EXPERTS)),
        *(("openpangu", o) for o in ((), ("down",))),
    ],
)
def test_logits_stay_the_same_in_float64(family: str, online: tuple[str, ...]) -> None:
    traced, ctx = _in_float64(family)
    gm = clone(traced)
    records = run_passes(gm, ctx, "W4A4", Rotate(online=online))
    proved = records[-1].proved_difference
    assert proved is not None and proved < 1e-12
    caches: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ())
    for tokens in (5, 2):  # a prompt, then more with the caches that the graph itself made
        ids = token_ids(2, tokens, seed=tokens)
        before, after = (
            run(graph, batch(ctx, ids, cache))
            for graph, cache in ((traced, caches[0]), (gm, caches[1]))
        )
        assert (before[0] - after[0]).abs().max() < 1e-11 * before[0].abs().max()
        caches = before[1:], after[1:]
    assert not torch.allclose(caches[0][1], caches[1][1])  # values are rotated
    assert torch.allclose(caches[0][0], caches[1][0])  # keys are not


@pytest.mark.parametrize("family", ["llama", "qwen2", "openpangu"])
def test_weights_by_hand(family: str) -> None:
    """Against dense products: embedding, a norm's readers, a writer, values."""
    old = weights_of(canonical(family)[0])
    gm, result = rotated(family, Rotate())
    generator = torch.Generator().manual_seed(0)
    q, head = (random_rotation(n, generator).dense() for n in (64, 16))
    assert [row["size"] for row in rows(result)] == [64, 16, 16]
    values = torch.block_diag(*[head] * 2)
    attended = torch.block_diag(*[head] * 4)
    layer = "model.layers.0."
    table = old.get("model.embed_tokens.weight", old["lm_head.weight"]).double()
    gain, last = (old[n].double() for n in (layer + "input_layernorm.weight", "model.norm.weight"))
    expected = {
        "model.embed_tokens.weight": table @ q,
        "lm_head.weight": old["lm_head.weight"].double() * last @ q,
        layer + "self_attn.q_proj.weight": old[layer + "self_attn.q_proj.weight"] * gain @ q,
        layer + "self_attn.v_proj.weight":
            values.T @ (old[layer + "self_attn.v_proj.weight"] * gain @ q),
        layer + "self_attn.o_proj.weight":
            q.T @ old[layer + "self_attn.o_proj.weight"].double() @ attended,
        layer + "mlp.down_proj.weight": q.T @ old[layer + "mlp.down_proj.weight"].double(),
        layer + "input_layernorm.weight": torch.ones(64),
    }  # fmt: skip
    for name, turn in (("v_proj", values), ("o_proj", q)):
        stored = f"{layer}self_attn.{name}.bias"
        if stored in old:
            expected[stored] = old[stored].double() @ turn
    for name, tensor in expected.items():
        rounded = weights_of(gm)[name]
        step = torch.nextafter(rounded.abs(), torch.tensor(torch.inf)) - rounded.abs()
        error = (rounded.double() - tensor.double()).abs()
        assert (error <= 0.5 * step.double() + 1e-13).all(), name  # rounded once


def test_the_callers_model_is_never_changed() -> None:
    before = weights_of(canonical("llama")[0])
    kept = {name: tensor.clone() for name, tensor in before.items()}
    rotated("llama", Rotate(online=ONLINE))
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.items())


def test_tied_embeddings_become_two_weights() -> None:
    gm, result = rotated("qwen2", Rotate())
    size = 96 * 64 * 4
    assert rows(result, "untied") == [
        {"weight": "lm_head.weight", "copy": "model.embed_tokens.weight", "bytes": size},
        {"weight": "all weights", "copy": "", "bytes": size},
    ]
    assert not torch.equal(
        weights_of(gm)["lm_head.weight"], get_tensor(gm, "model.embed_tokens.weight")
    )
    assert not rows(rotated("llama", Rotate())[1], "untied")


# --- online rotations ---------------------------------------------------------------------------


def test_what_online_rotations_add_to_the_graph() -> None:
    gm, result = rotated("llama", Rotate(online=ONLINE))
    added = [row for row in rows(result) if row["kind"] in ONLINE]
    assert [(row["kind"], row["size"], row["matrix"]) for row in added] == [
        ("heads", 4, "hadamard 2 x 2"),
        ("down", 96, "hadamard 8 x 12"),
    ] * 2
    down = find_label(gm, "model.layers.0.mlp.down_proj:linear")
    assert label(down.args[0]) == "model.layers.0.mlp:swiglu.rotated"
    matmuls = [n for n in gm.graph.nodes if n.target is aten.matmul.default]
    assert len(matmuls) == 2 * (2 + 1)  # two factors before down_proj, one across heads
    assert get_tensor(gm, "rotate.down_96_96_float32_right").shape == (12, 12)
    assert len({n.args[1] for n in matmuls if "runs_right" in label(n)}) == 1  # all layers share it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(size=st.sampled_from([2, 8, 9, 12, 96, 100, 576]), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_stored_factors_and_the_weights_side_cancel(
    dtype: torch.dtype, size: int, seed: int
) -> None:
    """x K W K^-T equals x W in float64 for K as stored, whatever its dtype rounded away."""
    rotation = random_rotation(size, torch.Generator().manual_seed(seed))
    online = OnlineRotation.of(rotation, dtype)
    factors = [
        torch.eye(len(side), dtype=torch.float64) if stored is None else stored.double()
        for stored, side in ((online.left, rotation.left), (online.right, rotation.right))
    ]
    identity = torch.kron(*factors) @ online.weights.dense().T
    assert (identity - torch.eye(size)).abs().max() < 1e-12
    if "hadamard" in rotation.how and "cosine" not in rotation.how:  # nothing was rounded
        assert all(len(factor.abs().unique()) == 1 for factor in factors)


@pytest.mark.parametrize("target", ["cpu", "ascend910b1"])
def test_online_rotations_survive_lowering(target: str) -> None:
    model, ids = make_model("llama"), token_ids(2, 9)
    recipe = {
        "name": "rotated",
        "schemes": {"*": "W8A8_DYNAMIC"},
        "passes": [{"rotate": {"online": [*ONLINE]}}, "insert-fake-quant", "quantize-weights"],
    }
    compiled = panguq.compile(model, recipe, calibration=token_ids(2, 16), target=target)
    expected = model(ids).logits
    error = (compiled(ids).logits.float() - expected).norm() / expected.norm()
    assert error < 0.1
    broken = (compiled(ids.flip(1)).logits.float() - expected).norm() / expected.norm()
    assert broken > 0.5  # the bound above can fail


# --- the proof ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forgotten", ["lm_head", "layers.1.mlp.down_proj", "layers.0.self_attn.v_proj"]
)
def test_a_forgotten_weight_is_caught(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = WeightPlan.turn

    def forgetful(plan: WeightPlan, found, rotation) -> None:
        if forgotten not in found.weight:
            turn(plan, found, rotation)

    monkeypatch.setattr(WeightPlan, "turn", forgetful)
    with pytest.raises(NumericsError, match="in float64; rounding explains at most"):
        rotated("llama", Rotate())


def test_a_forgotten_norm_or_online_rotation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(WeightPlan, "empty_norm", lambda plan, norm: None)
        with pytest.raises(NumericsError, match="q_proj:linear changed"):
            rotated("llama", Rotate())
    monkeypatch.setattr(WeightPlan, "columns", lambda plan, linear, rotation: None)
    with pytest.raises(NumericsError, match="down_proj:linear changed"):
        rotated("llama", Rotate(sites=(), online=("down",)))


# --- determinism and degenerate weights ---------------------------------------------------------


def test_the_seed_decides_every_bit() -> None:
    first, again, other = (
        weights_of(rotated("openpangu", Rotate(online=ONLINE), seed=seed)[0]) for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


class Norms(nn.Module):
    """inputs ─► write ─► norm ─► read."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(size)
        self.write = nn.Linear(4, size)
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.read = nn.Linear(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.norm(self.write(x)))


@given(size=st.sampled_from([2, 6, 9, 12, 16, 18]), zeros=st.integers(0, 2), seed=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_any_size_and_norm_weights_that_are_zero(size: int, zeros: int, seed: int) -> None:
    module = Norms(size).double()
    with torch.no_grad():
        module.norm.weight.uniform_(-2, 2)
        module.norm.weight[:zeros] = 0.0
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    gm, interface = trace_tiny(module, x)
    ctx = replace(tiny_context(interface, x), seed=seed)
    (record,) = run_passes(gm, ctx, "W4A16-per_channel" if size % 2 == 0 else "W8A8", Rotate())[2:]
    assert record.result.changed == 1
    assert torch.allclose(run(gm, {interface.inputs[0]: x})[0], module(x), rtol=1e-11, atol=1e-12)


def test_a_dead_stream_and_a_single_token() -> None:
    module = Norms(16).double()
    with torch.no_grad():
        module.write.weight.zero_()
        module.write.bias.zero_()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    gm, interface = trace_tiny(module, x)
    run_passes(gm, tiny_context(interface, x), "W8A8", Rotate())
    one = torch.randn(3, 1, 4, dtype=torch.float64)
    assert torch.allclose(run(gm, {interface.inputs[0]: one})[0], module(one))


def test_a_weight_that_overflows() -> None:
    module = Norms(16).half()
    with torch.no_grad():
        module.norm.weight.fill_(2.0)
        module.read.weight.fill_(6e4)
    x = torch.randn(3, 5, 4).half()
    gm, interface = trace_tiny(module, x)
    with pytest.raises(
        NumericsError, match=r"rotate: weight read\.weight is not finite in torch\.fl"
    ):
        run_passes(gm, tiny_context(interface, x), "W8A8", Rotate())


# --- what is left alone -------------------------------------------------------------------------


def test_float_models_are_left_alone() -> None:
    gm, _ = canonical("llama")
    old = weights_of(gm)
    result = run_passes(gm, family_context("llama"), "FLOAT", Rotate(online=ONLINE))[2].result
    assert result.changed == 0 and not result.tables
    assert all(old[name] is tensor for name, tensor in weights_of(gm).items())
    reasons = {skip.reason for skip in result.skipped}
    assert "no linear that reads it is quantized" in reasons
    assert "it is not quantized, so its input is not rotated online" in reasons


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_stream_of_layer_norms_stays(family: str) -> None:
    _, result = rotated(family, Rotate(online=ONLINE))
    assert {row["kind"] for row in rows(result)} == {"value", *ONLINE}
    skips = [skip for skip in result.skipped if skip.node.endswith("layer_norm")]
    assert skips and all("subtracts the mean" in skip.reason for skip in skips)


def test_kinds_that_are_not_selected() -> None:
    _, result = rotated("llama", Rotate(sites=("value",)))
    assert [row["kind"] for row in rows(result)] == ["value", "value"]
    assert any(
        skip.node == "model.embed_tokens:embedding"
        and skip.reason == "sites of kind residual are not selected"
        for skip in result.skipped
    )


def test_wrong_options() -> None:
    with pytest.raises(RecipeError, match="did you mean residual"):
        Rotate(sites=("residuals",))
    with pytest.raises(RecipeError, match="did you mean heads"):
        Rotate(online=("head",))


# --- what it is good for ------------------------------------------------------------------------


def outlier_model() -> nn.Module:
    """A Llama whose stream has one massive channel, as trained models have."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[:, 7] = 40.0
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
                linear.weight.mul_(3.0)
    return model


def w4a4_error(model: nn.Module, *before: Pass) -> float:
    """KL(float ‖ W4A4) in nats, mean per token."""
    gm, interface = trace_causal_lm(model)
    ctx = PassContext(interface, WeightStore())
    run_passes(gm, ctx, "W4A4", *before, InsertFakeQuant(), QuantizeWeights())
    ids = token_ids(4, 24)
    reference = model(ids).logits.log_softmax(-1)
    inputs = {name: v.float() if v.is_floating_point() else v
              for name, v in batch(ctx, ids, ()).items()}  # fmt: skip
    logits = run(gm, inputs)[0].log_softmax(-1)
    return (
        functional.kl_div(logits, reference, log_target=True, reduction="sum").item() / ids.numel()
    )


def test_an_outlier_channel_costs_less_once_it_is_rotated() -> None:
    plain = w4a4_error(outlier_model())
    turned = w4a4_error(outlier_model(), Rotate())
    assert turned < plain / 2


def test_smoothquant_works_after_and_before() -> None:
    """A norm whose weight is ones can still take up a scale."""
    gm, _ = canonical("openpangu")
    records = run_passes(gm, family_context("openpangu"), "W8A8", Rotate(), SmoothQuant())
    kinds = {row["kind"] for row in rows(records[-1].result, "scales")}
    assert kinds == {"norm_linear", "value_output", "up_down"}
    assert records[-1].proved_difference is not None
    before = run_passes(canonical("openpangu")[0], family_context("openpangu"), "W8A8",
                        SmoothQuant(), Rotate())  # fmt: skip
    assert [row["kind"] for row in rows(before[-1].result)] == ["residual", "value", "value"]
