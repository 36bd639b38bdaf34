"""AscendV1 folders read back: the written quantization, to the bit where the arithmetic is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import panguq
from panguq.check.ascend_read import FakeQuantExperts, FakeQuantLinear, load_ascend_v1
from panguq.errors import StorageError
from panguq.formats.checkpoint.ascend_v1 import save_ascend_v1
from panguq.formats.checkpoint.graph import read_checkpoint_graph
from panguq.formats.checkpoint.linear import QuantizedLinear
from tests.check.check_folders import GATE, LAYER, VOCAB, Q, ascend
from tests.formats.checkpoint.ascend_reference import reference, sqnr_db
from tests.formats.checkpoint.test_ascend_v1 import IDS, SIZES, compiled
from tests.model_folders import make_model
from tests.model_shelf import EXPERTS, shared_model, token_ids

SCHEMES = ["W8A8", "W8A8_DYNAMIC", "W8A16", "W4A8"]
TYPES = ["W8A8", "W8A8_DYNAMIC", "W8A16", "W4A8_DYNAMIC"]
TOKENS = torch.arange(3, 35)[None] % VOCAB


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_read_is_what_was_compiled(scheme: str, tmp_path: Path) -> None:
    model = compiled(scheme)
    save_ascend_v1(model.artifact, tmp_path / "out", shard_bytes=300_000)
    read = load_ascend_v1(tmp_path / "out")
    for path, linear in read_checkpoint_graph(model.artifact).quantized.items():
        module = read.get_submodule(path)
        assert isinstance(module, FakeQuantLinear)
        assert torch.equal(module.weight(linear.dtype), linear.dequantized())
        x = torch.randn(1, 8, linear.shape[1], dtype=linear.dtype)
        given = fake_quantized(x, linear)
        assert torch.equal(module.quantized_input(x), given)
        expected = nn.functional.linear(given, linear.dequantized(), linear.bias)
        assert torch.equal(module(x), expected)


def fake_quantized(x: Tensor, linear: QuantizedLinear) -> Tensor:
    """x as the nodes of the fake-quant graph have it."""
    ops = torch.ops.panguq
    if linear.scheme.activation is None:
        return x
    if linear.input_scale is None:
        codes, scale = ops.quantize_per_token(x, 127)
        return ops.dequantize(codes, scale, None, x.dtype)
    affine = (linear.input_scale, linear.input_zero_point)
    return ops.dequantize(ops.quantize_per_tensor(x, *affine, -128, 127), *affine, x.dtype)


def test_weight_only_logits_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    model = compiled("W8A16")
    save_ascend_v1(model.artifact, tmp_path / "out")
    source = make_model(**SIZES, attention_bias=True)
    for parameter in source.parameters():  # buffers stay: rotary frequencies are float32
        parameter.data = parameter.data.bfloat16()
    for path, linear in read_checkpoint_graph(model.artifact).quantized.items():
        source.get_submodule(path).weight = nn.Parameter(linear.dequantized())
    assert torch.equal(load_ascend_v1(tmp_path / "out")(IDS).logits, source(IDS).logits)


# --- against a reference that owes panguq nothing -----------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_logits_equal_an_independent_dequantization(kind: str, tmp_path: Path) -> None:
    folder = ascend(kind, kind).write(tmp_path / "out")
    expected = reference(folder)(TOKENS).logits
    found = load_ascend_v1(folder, torch.float32)(TOKENS).logits
    assert sqnr_db(expected, found) >= 100
    assert sqnr_db(2 * expected, found) < 100


def test_w8a8_without_weight_scales_is_read(tmp_path: Path) -> None:
    """msModelSlim's newer writer leaves them out: they are deq_scale / input_scale."""
    draft = ascend("W8A8", "W8A8")
    whole = load_ascend_v1(draft.write(tmp_path / "whole"), torch.float32)(TOKENS).logits
    for name in list(draft.tensors):
        if name.endswith(("weight_scale", "weight_offset")):
            del draft.tensors[name], draft.description[name]  # type: ignore[attr-defined]
    without = load_ascend_v1(draft.write(tmp_path / "without"), torch.float32)(TOKENS).logits
    assert sqnr_db(whole, without) >= 100


def test_float16_scales_are_read(tmp_path: Path) -> None:
    draft = ascend("W8A8", "W8A8", dtype="float16")
    whole = load_ascend_v1(draft.write(tmp_path / "whole"), torch.float32)(TOKENS).logits
    for name in [n for n in draft.tensors if n.endswith("weight_scale")]:
        del draft.tensors[name], draft.description[name]  # type: ignore[attr-defined]
    without = load_ascend_v1(draft.write(tmp_path / "without"), torch.float32)(TOKENS).logits
    assert sqnr_db(whole, without) >= 100


def test_a_norm_bias_is_added(tmp_path: Path) -> None:
    """msModelSlim's anti-outlier methods may leave one at a norm that has none."""
    draft = ascend("W8A16", "W8A16")
    plain = load_ascend_v1(draft.write(tmp_path / "plain"), torch.float32)
    draft.tensors["model.norm.bias"] = torch.randn(256)
    draft.description["model.norm.bias"] = "FLOAT"  # type: ignore[index]
    biased = load_ascend_v1(draft.write(tmp_path / "biased"), torch.float32)
    hidden = plain.model(TOKENS).last_hidden_state + draft.tensors["model.norm.bias"]
    assert torch.equal(biased.model(TOKENS).last_hidden_state, hidden)


def test_a_tied_head_that_is_not_stored_is_tied(tmp_path: Path) -> None:
    draft = ascend()
    draft.config["tie_word_embeddings"] = True  # type: ignore[index]
    del draft.tensors["lm_head.weight"]
    read = load_ascend_v1(draft.write(tmp_path / "tied"))
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert torch.equal(read.lm_head.weight, draft.tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{Q}.input_scale", "q_proj.input_scale is missing"),
        ("model.norm.weight", "1 weights are missing: model.norm.weight"),
        (f"{GATE}.weight", "gate_proj.weight"),
    ],
)
def test_a_missing_tensor_is_named(name: str, message: str, tmp_path: Path) -> None:
    draft = ascend()
    del draft.tensors[name]
    with pytest.raises(StorageError, match=message):
        load_ascend_v1(draft.write(tmp_path / "broken"))


def test_other_types_are_refused(tmp_path: Path) -> None:
    folder = ascend(mlp="W4A4_DYNAMIC").write(tmp_path / "w4a4")
    with pytest.raises(StorageError, match="is W4A4_DYNAMIC, which panguq does not read back"):
        load_ascend_v1(folder)


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    draft = ascend()
    draft.tensors[f"{LAYER}.mlp.router.weight"] = torch.ones(4)
    with pytest.raises(StorageError, match=r"router\.weight has no place"):
        load_ascend_v1(draft.write(tmp_path / "more"))


def test_a_shape_that_does_not_fit_is_named(tmp_path: Path) -> None:
    draft = ascend()
    draft.tensors[f"{GATE}.weight"] = draft.tensors[f"{GATE}.weight"][:128]
    with pytest.raises(StorageError, match=r"gate_proj\.weight has codes \[128, 256\]"):
        load_ascend_v1(draft.write(tmp_path / "small"))


@pytest.mark.parametrize("recipe", ["w8a8-dynamic-serving", "w8a16"])
def test_experts_are_read_one_by_one(recipe: str, tmp_path: Path) -> None:
    compiled = panguq.compile(
        shared_model(EXPERTS), recipe, calibration=[token_ids(1, 32)], dtype=torch.bfloat16
    )
    compiled.save(tmp_path / "out", format="ascend")
    read = load_ascend_v1(tmp_path / "out")
    block = read.model.layers[1].mlp.experts
    assert isinstance(block, FakeQuantExperts)
    assert len(block.gate_up_proj) == read.config.num_experts
    ids = token_ids(2, 24, 7)
    wanted = compiled(ids).logits.float()
    assert sqnr_db(wanted, read(ids).logits.float()) > 25


def test_experts_that_stay_float_are_stacked(tmp_path: Path) -> None:
    recipe = {
        "name": "attention",
        "schemes": {"*": "W8A16", "model.layers.*.mlp.experts.*": "FLOAT"},
        "passes": ["calibrate", "insert-fake-quant", "quantize-weights"],
    }
    model = shared_model(EXPERTS)
    compiled = panguq.compile(model, recipe, calibration=[token_ids(1, 32)], dtype=torch.bfloat16)
    compiled.save(tmp_path / "out", format="ascend")
    read = load_ascend_v1(tmp_path / "out").model.layers[1].mlp.experts
    wanted = model.model.layers[1].mlp.experts
    assert torch.equal(read.gate_up_proj, wanted.gate_up_proj.bfloat16())
    assert torch.equal(read.down_proj, wanted.down_proj.bfloat16())
