"""An 8-bit KV cache: the same numbers with and without a cache, and int8 where it says so."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import panguq
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.errors import InputError, PanguqError, RecipeError
from panguq.formats.onnx.run import OnnxModel
from panguq.ir.edit import find_label, get_tensor, label, weights_of
from panguq.ir.run.interpret import run, values
from panguq.passes.calibrate import Calibrate
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import PassContext
from panguq.passes.quantize_kv_cache import QuantizeKvCache, channel_scale
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.smoothquant import SmoothQuant
from tests.families.models import make
from tests.families.sweep import CALIBRATION, IDS, quantized
from tests.model_shelf import (
    canonical,
    family_context,
    hand_written,
    run_passes,
    run_pipeline,
    shared_model,
    token_ids,
)
from tests.shared_traces import shared_traces

ops = torch.ops.panguq
PER_TOKEN = QuantizeKvCache(keys="per_token", values="per_token")
MIXED = "keys per channel, values per token"
VARIANTS = {
    "per_channel": QuantizeKvCache(),
    "per_token": PER_TOKEN,
    MIXED: QuantizeKvCache(values="per_token"),
}


@pytest.fixture(autouse=True, scope="module")
def one_trace_a_model() -> Iterator[None]:
    with shared_traces():
        yield


@functools.cache
def compiled(family: str, variant: str = "per_channel", target: str = "cpu") -> CompiledCausalLM:
    """A model whose cache alone is quantized."""
    recipe = panguq.Recipe(schemes={"*": "FLOAT"}, passes=(VARIANTS[variant],))
    model = panguq.compile(
        shared_model(family), recipe, calibration=token_ids(4, 32), target=target
    )
    assert isinstance(model, CompiledCausalLM)
    return model


def cached_tensors(model: CompiledCausalLM, ids: Tensor) -> list[Tensor]:
    layers = model(ids).past_key_values.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def greedy_without_cache(model: CompiledCausalLM, ids: Tensor, tokens: int) -> Tensor:
    for _ in range(tokens):
        following = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
    return ids


# --- the numbers --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.integers(-12, 12))
def test_codes_err_by_half_a_scale(seed: int, power: int) -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    scale = channel_scale(x.abs().amax((0, 2)))
    codes = ops.quantize_per_channel(x, scale, 127)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert codes.abs().amax((0, 2)).eq(127).all()  # every channel uses its codes
    error = (ops.dequantize(codes, scale, None, torch.float32) - x).abs()
    assert (error <= scale * (0.5 + 1e-4)).all()


def test_scales_by_hand() -> None:
    """A channel that was never alive takes its head's largest; an all-zero head any."""
    amax = torch.tensor([[127.0, 0.0, 254.0], [0.0, 0.0, 0.0]])
    assert torch.equal(
        channel_scale(amax), torch.tensor([[[1.0, 2.0, 2.0]], [[1 / 127, 1 / 127, 1 / 127]]])
    )


def test_what_exceeds_the_calibrated_range_is_clipped() -> None:
    x = torch.tensor([[-3.0, 3.0, 0.5]]).reshape(1, 1, 1, 3)
    codes = ops.quantize_per_channel(x, torch.full((1, 1, 3), 1 / 127), 127)
    assert codes.flatten().tolist() == [-127, 127, 64]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scales_are_the_calibration_maxima(family: str) -> None:
    gm, _ = canonical(family)
    ctx = family_context(family)
    maxima: dict[str, Tensor] = {}
    output = next(reversed(gm.graph.nodes))
    for name, grown in zip(("key_0", "value_0"), output.args[0][1:3], strict=True):
        seen = [values(gm, batch, [grown])[grown] for batch in ctx.batches]
        maxima[name] = torch.stack([s.abs().amax((0, 2)) for s in seen]).amax(0)
    result = run_pipeline(gm, [QuantizeKvCache()], ctx, held=QuantizeKvCache.requires)[0][0].result
    for name, expected in maxima.items():
        scale = get_tensor(gm, f"cache.{name}_scale")
        assert scale.dtype == torch.float32
        assert torch.equal(scale[:, 0] * 127, expected / 127 * 127)
    table = result.tables["cache"]
    first = dict(zip(table.columns, table.rows[0], strict=True))
    assert (first["layer"], first["part"], first["scales"]) == (0, "key", "per_channel")
    heads = maxima["key_0"].shape[0]
    assert (first["float_bytes_per_token"], first["bytes_per_token"]) == (heads * 64, heads * 16)
    assert result.changed == len(table.rows) == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_numbers_are_near_the_float_models(variant: str) -> None:
    """On the calibration data itself every number errs by half its own scale at most."""
    gm, _ = canonical("llama")
    ctx = family_context("llama")
    before = run(gm, ctx.batches[0])[1:3]  # the first layer sees the float model's values
    run_pipeline(gm, [VARIANTS[variant]], ctx, held=QuantizeKvCache.requires)
    after = run(gm, ctx.batches[0])[1:3]
    for name, old, new in zip(("key_0", "value_0"), before, after, strict=True):
        if new.dtype == torch.int8:
            scale = get_tensor(gm, f"cache.{name}_scale")
            new = new * scale
        else:
            scale = old.abs().amax(-1, keepdim=True) / 127
        assert ((new - old).abs() <= scale * (0.5 + 1e-4)).all()
        assert not torch.equal(new, old)


# --- with a cache as without --------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["per_channel", MIXED])
def test_generating_with_the_cache_equals_forwards_without(variant: str) -> None:
    model = compiled("llama", variant)
    ids = token_ids(2, 6, seed=7)
    expected = greedy_without_cache(model, ids, 6)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("variant", ["per_channel", MIXED])
def test_logits_of_a_step_equal_those_of_the_whole(variant: str) -> None:
    model = compiled("llama", variant).at_stage("fake-quant")
    ids = token_ids(2, 9, seed=3)
    past = model(ids[:, :5]).past_key_values
    stepped = model(ids[:, 5:], past_key_values=past).logits
    assert torch.allclose(stepped, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-5)


def test_padded_prompts_generate_as_without_padding() -> None:
    model = compiled("llama")
    ids = token_ids(1, 5, seed=2)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    alone = model(ids).logits[:, -1]
    beside = model(padded, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert torch.allclose(alone, beside, rtol=1e-3, atol=1e-3)


# --- what the cache is --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "dtypes"),
    [
        ("per_channel", [torch.int8, torch.int8]),
        (MIXED, [torch.int8, torch.float32]),
    ],
)
def test_the_cache_holds_int8_where_it_says_so(variant: str, dtypes: list[torch.dtype]) -> None:
    model = compiled("llama", variant)
    for graph in model.stages.values():
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"][4:]
        assert [n.meta["val"].dtype for n in inputs] == dtypes * 2
    tensors = cached_tensors(model, token_ids(2, 7))
    assert [t.dtype for t in tensors] == dtypes * 2
    assert all(t.shape == (2, 2, 7, 16) for t in tensors)  # grouped: 2 of 4 heads are stored


def test_a_byte_a_number() -> None:
    """2 layers, 3 sequences, 9 tokens, 2 heads of 16: keys of one byte, values of one or four."""
    ids, numbers = token_ids(3, 9), 2 * 3 * 9 * 2 * 16
    for variant, value_bytes in (("per_channel", 1), (MIXED, 4)):
        tensors = cached_tensors(compiled("llama", variant), ids)
        assert sum(t.nbytes for t in tensors) == numbers * (1 + value_bytes)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = compiled("llama")
    model.save(tmp_path / "model")
    loaded = panguq.load(tmp_path / "model")
    assert isinstance(loaded, CompiledCausalLM)
    assert loaded.interface == model.interface
    ids = token_ids(2, 6, seed=7)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_another_models_cache_is_refused() -> None:
    ids = token_ids(1, 4)
    codes, mixed = compiled("llama"), compiled("llama", MIXED)
    with pytest.raises(InputError, match=r"tensor 1 is torch\.float32, expected torch\.int8"):
        codes(ids, past_key_values=mixed(ids).past_key_values)
    with pytest.raises(InputError, match=r"tensor 1 is torch\.int8, expected torch\.float32"):
        mixed(ids, past_key_values=codes(ids).past_key_values)


def test_on_ascend() -> None:
    """The vendor's attention reads dequantized values; nothing is left that an NPU cannot run."""
    model = compiled("llama", MIXED, "ascend910b1")
    called = {str(n.target) for n in model.graph.graph.nodes}
    assert {"npu.npu_fused_infer_attention_score.default", "npu.npu_dynamic_quant.default"} < called
    assert not any(name.startswith("panguq.") for name in called)
    ids = token_ids(2, 6, seed=7)
    expected, found = model.at_stage("fake-quant")(ids), model(ids)
    (before, after) = (output.past_key_values.layers[0] for output in (expected, found))
    assert before.keys.dtype == after.keys.dtype == torch.int8
    assert (before.keys.int() - after.keys.int()).abs().max() <= 2  # the norm rounds elsewhere
    assert torch.allclose(before.values, after.values, rtol=2**-5, atol=2**-5)
    assert (expected.logits - found.logits).abs().max() < 0.1 * expected.logits.abs().max()
    stepped = model(ids[:, 4:], past_key_values=model(ids[:, :4]).past_key_values).logits
    assert (stepped - found.logits[:, 4:]).abs().max() < 0.1 * expected.logits.abs().max()


def test_onnx_runs_with_the_int8_cache(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = compiled("llama")
    model.export_onnx(tmp_path / "model.onnx")
    onnx = OnnxModel(tmp_path / "model.onnx", model.interface)
    ids = token_ids(2, 6, seed=7)
    _, past = onnx.logits(ids[:, :4])
    expected = model(ids[:, :4])
    assert all(str(t.dtype) == "torch.int8" for t in past)
    found, _ = onnx.logits(ids[:, 4:], past)
    whole = model(ids[:, 4:], past_key_values=expected.past_key_values).logits
    assert torch.allclose(found, whole, rtol=1e-3, atol=1e-3)


def test_servers_formats_refuse_it(tmp_path: Path) -> None:
    with pytest.raises(PanguqError, match="read by something else than a matmul"):
        compiled("llama").save(tmp_path / "model", format="compressed-tensors")


# --- where nothing, or less, may happen ---------------------------------------------------------


def test_a_graph_without_a_cache_is_skipped() -> None:
    recipe = panguq.Recipe(schemes={"*": "W8A16"}, passes=(QuantizeKvCache(),))
    gm, interface = panguq.compiler.trace(hand_written(), (token_ids(2, 8),), None)
    ctx = PassContext(interface, family_context("llama").store)
    records, _ = run_pipeline(gm, recipe.build(), ctx)
    result = records[-1].result
    assert result.changed == 0
    assert [skip.reason for skip in result.skipped] == [
        "the graph has no KV cache: it takes and returns no past keys"
    ]


def test_a_float_cache_is_untouched() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama")
    before = [label(n) for n in gm.graph.nodes]
    result = QuantizeKvCache(keys="float", values="float").run(gm, ctx)
    assert result.changed == 0 and len(result.skipped) == 4
    assert [label(n) for n in gm.graph.nodes] == before
    assert all(layer.key_dtype == layer.value_dtype == "float" for layer in ctx.interface.cache)
    assert all(t.dtype != torch.int8 for t in ctx.batches[0].values())


def test_a_past_with_another_reader_is_left_alone() -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama")
    past = next(n for n in gm.graph.nodes if n.target == "past_key_0")
    linear = find_label(gm, "model.layers.0.self_attn:attention")
    with gm.graph.inserting_before(linear):
        gm.graph.call_function(torch.ops.aten.abs.default, (past,)).meta = dict(past.meta)
    result = QuantizeKvCache().run(gm, ctx)
    assert result.changed == 3
    assert result.skipped[0].node == "past_key_0" and "reads the past" in result.skipped[0].reason
    assert ctx.interface.cache[0].key_dtype == "float"
    assert ctx.interface.cache[0].value_dtype == "int8"


def test_values_behind_a_quantized_cache_are_not_rescaled() -> None:
    """Static scales would not fit any more; sites in front of it are smoothed as ever."""
    gm, _ = canonical("llama")
    ctx = family_context("llama")
    records = run_passes(gm, ctx, "W8A8_DYNAMIC", QuantizeKvCache(), SmoothQuant())
    table = records[-1].result.tables["scales"]
    kinds = {dict(zip(table.columns, row, strict=True))["kind"] for row in table.rows}
    assert "norm_linear" in kinds and "value_output" not in kinds


# --- orders and data ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 2, 3])
def test_it_may_stand_anywhere_in_a_recipe(place: int) -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama")
    passes = [Calibrate(), InsertFakeQuant(), QuantizeWeights()]
    passes.insert(place, QuantizeKvCache())
    run_passes(gm, ctx, "W8A8", *passes)
    assert ctx.interface.cache[1].value_dtype == "int8"
    assert "cache.value_1_scale" in weights_of(gm)
    assert all(t.isfinite().all() for t in run(gm, ctx.batches[0]))


def test_it_needs_a_canonical_graph() -> None:
    gm, _ = canonical("llama")
    with pytest.raises(RecipeError, match="needs CANONICAL"):
        run_pipeline(gm, [QuantizeKvCache()], family_context("llama"))


def test_no_calibration_data() -> None:
    gm, _ = canonical("llama")
    with pytest.raises(InputError, match="no calibration data"):
        QuantizeKvCache().run(gm, replace(family_context("llama"), batches=()))
    assert PER_TOKEN.run(gm, replace(family_context("llama"), batches=())).changed == 4


def test_latent_attention_whose_cache_a_linear_reads() -> None:
    """The linear's input is quantized, too: the cache's codes have labels of their own."""
    model = make("minicpm3")
    latent = panguq.compile(model, "w8a8-dynamic-kv8", calibration=CALIBRATION)
    assert {(c.key_dtype, c.value_dtype) for c in latent.interface.cache} == {("int8", "int8")}
    quantized(model, latent)
    past = latent(IDS[:, :4], use_cache=True)
    cache = past.get("cache", past.get("past_key_values"))
    expected, rest = latent(IDS).logits[:, 4:], latent(IDS[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected, atol=1e-5, rtol=1e-5)
