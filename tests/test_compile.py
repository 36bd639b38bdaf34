"""compile end to end: every preset on tiny models, reproducible, honest about what it hurts."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import panguq
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.compiled_module import CompiledModule
from panguq.errors import InputError, LoweringError, NumericsError, PanguqError, RecipeError
from panguq.evaluation import evaluate, logits_of
from panguq.ir.edit import label, op_name, weights_of
from panguq.recipe import Recipe, preset_names
from tests.model_folders import make_tokenizer
from tests.model_shelf import (
    FAMILIES,
    VOCAB,
    HandWritten,
    hand_written,
    make_model,
    shared_model,
    token_ids,
)
from tests.shared_traces import shared_traces

QUANTIZED = tuple(
    name for name in preset_names() if name not in ("float", "w8a8-fp8")
)  # FP8: tests/test_reference_target.py
KERNELS = {
    "w8a8": {"int8_linear"},
    "w8a8-dynamic": {"int8_linear"},
    "w8a16": {"int8_weight_linear"},
    "w4a16": {"int4_linear"},
    "w4a16-asym": {"int4_linear"},
    "w4a8": {"dequantized_linear"},  # a CPU has no kernel of its own for it
    "w8a8-serving": {"int8_linear"},
    "w8a8-dynamic-serving": {"int8_linear"},
    "w8a8-dynamic-kv8": {"int8_linear"},
    "w6a16": {"dequantized_linear"},
    "mixed-4.75": {"int4_linear", "int8_weight_linear"},
    "w4a16-gptq": {"int4_linear"},
    "w4a16-gptaq": {"int4_linear"},
    "w4a16-awq": {"int4_linear"},
    "w4a16-rounding": {"int4_linear"},
    "w4a16-tuned": {"int4_linear"},
    "w4a8-gptq": {"dequantized_linear"},
    "w4a8-tuned": {"dequantized_linear"},
    "w8a8-dynamic-tuned": {"int8_linear"},
    "w8a8-tuned": {"int8_linear"},
    "w8a8-smooth": {"int8_linear"},
    "w4a4-rotate": {"dequantized_linear"},
    "w4a4-flat": {"dequantized_linear"},
    "w3a16": {"dequantized_linear"},
    "w3a16-gptq": {"dequantized_linear"},
    "w3a16-tuned": {"dequantized_linear"},
    "w3a16-awq": {"dequantized_linear"},
    "w3a16-slim-llm": {"dequantized_linear"},
    "w2a16": {"dequantized_linear"},
    "w2a16-gptq": {"dequantized_linear"},
    "w2a16-slim-llm": {"dequantized_linear"},
    "w1-billm": {"binary_linear"},
}
NARROW = tuple(name for name in QUANTIZED if name[:2] in ("w1", "w2", "w3") or "a4" in name)

SLOW = ("-tuned", "-gptaq", "-rounding", "w4a8-gptq", "-flat", "-smooth")
"""What solves with gradients, or like gptq, is tried on one family alone."""


def least_db(preset: str) -> float:
    """What logits keep at least: far above the 0 dB of a doubled, shuffled or missing matmul."""
    return {"fl": 90, "w8": 20, "w6": 15, "w4": 8, "mi": 8}[preset[:2]]


def least_local_db(preset: str) -> float:
    """What each matmul keeps: a step of amax / 127 leaves about 40 dB, of amax / 7 about 17."""
    return 25 if preset.startswith("w8") else 12


EXAMPLE = (token_ids(2, 16),)


@pytest.fixture(autouse=True, scope="module")
def one_trace_a_model() -> Iterator[None]:
    with shared_traces():
        yield


@functools.cache
def compiled(family: str, preset: str) -> CompiledCausalLM:
    model = panguq.compile(shared_model(family), preset, calibration=token_ids(8, 32))
    assert isinstance(model, CompiledCausalLM)
    return model


def perplexity(model: object, windows: Tensor) -> float:
    return evaluate({"it": logits_of(model)}, windows)["it"]["perplexity"]


def logits_db(expected: Tensor, actual: Tensor) -> float:
    noise = (expected - actual).square().sum()
    return float(10 * torch.log10(expected.square().sum() / noise))


@pytest.mark.parametrize(
    ("family", "preset"),
    [
        *(("openpangu", name) for name in QUANTIZED if name not in NARROW),
        *(("opt", name) for name in QUANTIZED if name not in NARROW and not name.endswith(SLOW)),
    ],
)
def test_every_preset(family, preset) -> None:
    model, ids = compiled(family, preset), token_ids(3, 40, seed=9)
    with torch.no_grad():
        expected = shared_model(family)(ids).logits
    assert logits_db(expected, model(ids).logits) >= least_db(preset)
    matmuls = [m for m in model.report.matmuls if m.scheme != "FLOAT"]
    assert len(matmuls) == (14 if family == "openpangu" else 12)
    assert {m.kernel.split(".")[-1] for m in matmuls} <= KERNELS[preset] | {"dequantized_linear"}
    assert {m.kernel.split(".")[-1] for m in matmuls} & KERNELS[preset]
    assert model.report.warnings == ()
    local = [m.local_sqnr_db for m in matmuls if m.local_sqnr_db is not None]
    assert local and min(local) >= least_local_db(preset)


@pytest.mark.parametrize("preset", NARROW)
def test_every_narrow_preset(preset) -> None:
    """Few bits ruin a tiny random model: only what they are made of can be said."""
    model = compiled("openpangu", preset)
    matmuls = [m for m in model.report.matmuls if m.scheme != "FLOAT"]
    assert len(matmuls) == 14
    assert {m.kernel.split(".")[-1] for m in matmuls} == KERNELS[preset]
    assert model(token_ids(3, 40, seed=9)).logits.isfinite().all()


@pytest.mark.parametrize("preset", ["w4a16", "w4a16-gptq", "w4a16-awq", "w4a4-rotate", "w8a8"])
def test_the_given_model_is_not_changed(preset) -> None:
    model = make_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    panguq.compile(model, preset, calibration=token_ids(2, 16))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("preset", ["w8a8", "w4a16"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("openpangu", "opt")])
def test_every_family(family, preset) -> None:
    model, ids = compiled(family, preset), token_ids(3, 40, seed=9)
    with torch.no_grad():
        expected = shared_model(family)(ids).logits
    assert logits_db(expected, model(ids).logits) >= least_db(preset)


# Products in bfloat16 turn roundings of 4-bit activations, which a tiny random model magnifies.
@pytest.mark.parametrize("preset", [name for name in QUANTIZED if "a4" not in name])
def test_lowered_perplexity_is_the_fake_quant_graphs(preset) -> None:
    model, windows = compiled("openpangu", preset), token_ids(6, 48, seed=5)
    fake, lowered = (perplexity(model.at_stage(s), windows) for s in ("fake-quant", "lowered"))
    assert lowered == pytest.approx(fake, rel=0.01)
    assert fake != pytest.approx(perplexity(shared_model("openpangu"), windows), rel=1e-9)


def test_a_stage_that_is_not_there() -> None:
    with pytest.raises(PanguqError, match="no stage 'lowred'") as caught:
        compiled("openpangu", "w8a8").at_stage("lowred")
    assert caught.value.hint == "the stages are fake-quant, lowered"


@pytest.mark.parametrize("family", FAMILIES)
def test_float_is_the_identity(family) -> None:
    model, eager = panguq.compile(shared_model(family), "float"), shared_model(family)
    ids = token_ids(2, 33)
    with torch.no_grad():
        expected = eager(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(m.scheme == "FLOAT" for m in model.report.matmuls)
    assert {op_name(n) for n in model.graph.graph.nodes} & {"linear"}


def test_a_compiled_model_generates() -> None:
    model, ids = compiled("openpangu", "w8a8"), token_ids(2, 5)
    result = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert result.shape == (2, 11) and torch.equal(result[:, :5], ids)
    step = model(result[:, :-1]).logits[:, -1].argmax(-1)  # the last token, all at once
    assert torch.equal(step, result[:, -1])


def test_compiling_twice_gives_the_same_bits(caplog) -> None:
    """Without data: the calibration sequences are sampled, from the seed."""
    first, second = (panguq.compile(make_model("llama"), "w8a8") for _ in range(2))
    one, other = (weights_of(m.graph) for m in (first, second))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    ids = token_ids(2, 20)
    assert torch.equal(first(ids).logits, second(ids).logits)
    said = [r.message for r in caplog.records if r.name == "panguq"]
    assert "sampled from the model itself" in said[0] and "seed 0" in said[0]
    assert first.report.calibration.source == "sampled from the model itself"


def test_another_seed_gives_other_data() -> None:
    first, second = (panguq.compile(shared_model("llama"), "w8a8", seed=s) for s in (0, 1))
    one, other = (weights_of(m.graph) for m in (first, second))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_given_data_is_said(caplog) -> None:
    model = panguq.compile(shared_model("llama"), "w8a8", calibration=token_ids(3, 16))
    used = model.report.calibration
    assert str(used) == "given by the caller: 3 sequences, 48 tokens"
    assert (used.source, used.sequences, used.tokens) == ("given by the caller", 3, 48)
    assert not [r for r in caplog.records if "sampled" in r.message]


def test_own_text_beside_given_data(tmp_path) -> None:
    """As long as the longest sequence given; another number of them makes another compile."""
    given = [token_ids(1, 16)[0], token_ids(1, 24)[0]]
    one = panguq.compile(
        shared_model("llama"), "w8a8", calibration=given, sampled=2, work_dir=tmp_path / "work"
    )
    said = "given by the caller: 4 sequences, 88 tokens (2 of them sampled from the model itself)"
    assert str(one.report.calibration) == said
    assert key_of(tmp_path / "work")["sampled sequences"] == "2"
    other = panguq.compile(shared_model("llama"), "w8a8", calibration=given)
    assert not torch.equal(one(token_ids(1, 20)).logits, other(token_ids(1, 20)).logits)


def key_of(work_dir: Path) -> dict[str, str]:
    return json.loads((work_dir / "compile.json").read_text())


def test_no_text_is_written_where_none_is_needed() -> None:
    model = panguq.compile(shared_model("llama"), "float", calibration=token_ids(1, 16), sampled=2)
    assert model.report.calibration.sampled_sequences == 0


def test_who_writes_no_text() -> None:
    with pytest.raises(InputError, match="sampled -1"):
        panguq.compile(shared_model("llama"), "w8a8", sampled=-1)
    with pytest.raises(InputError, match="at most 16384"):
        panguq.compile(shared_model("llama"), "w8a8", sampled=10**9)
    with pytest.raises(InputError, match="only a causal language model"):
        panguq.compile(nn.Linear(32, 32), "w8a8", example_inputs=(torch.randn(3, 32),), sampled=1)


def test_float_says_nothing(caplog) -> None:
    panguq.compile(shared_model("llama"), "float")
    assert not [r for r in caplog.records if r.name == "panguq" and r.levelno >= logging.WARNING]


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "most"), [("w8a8", 1.1), ("w8a16", 1.1), ("w4a16", 0.6)])
def test_bytes_of_a_weight(preset, most) -> None:
    """At group 64 or more; an outlier's side matmul is counted apart."""
    for m in compiled("openpangu", preset).report.matmuls:
        if m.scheme == "FLOAT":
            assert m.stored_bytes >= 4 * m.n * m.k or m.is_side
        elif m.group_size is None or m.group_size >= 64:
            assert m.stored_bytes <= most * m.n * m.k


def test_a_bfloat16_compile() -> None:
    model = make_model("openpangu")
    ids = token_ids(2, 24)
    lowered = panguq.compile(model, "w8a8", calibration=token_ids(8, 32), dtype=torch.bfloat16)
    assert lowered.dtype == torch.bfloat16
    with torch.no_grad():
        expected = model(ids).logits
    assert next(model.parameters()).dtype == torch.float32
    assert logits_db(expected, lowered(ids).logits.float()) >= 18


# --- any module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["float", *(name for name in QUANTIZED if name not in NARROW)])
def test_any_module_with_example_inputs(preset) -> None:
    batches = [(token_ids(2, 16, seed),) for seed in range(4)]
    model = panguq.compile(hand_written(), preset, example_inputs=EXAMPLE, calibration=batches)
    assert type(model) is CompiledModule
    ids = token_ids(3, 21, seed=8)
    with torch.no_grad():
        expected = hand_written()(ids)
    assert logits_db(expected, model(ids)) >= least_db(preset)


def test_example_inputs_serve_where_no_calibration_data_is_given(caplog) -> None:
    compiled = panguq.compile(hand_written(), "w8a8", example_inputs=(token_ids(2, 16),))
    assert str(compiled.report.calibration) == "the example inputs"
    assert "example inputs" in caplog.text
    assert compiled(token_ids(3, 9)).shape[:2] == (3, 9)


class Convolution(nn.Module):
    """Nothing here is a matmul with a stored weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1) * 2


def test_a_module_without_matmuls() -> None:
    x = torch.randn(3, 4)
    model = panguq.compile(Convolution(), "w8a16", example_inputs=(x,), calibration=[x])
    assert torch.equal(model(x), Convolution()(x))
    assert model.report.matmuls == ()


# --- what hurts, and what is refused ------------------------------------------------------------


class Blind(HandWritten):
    """One column of a weight meets no activation and dwarfs all others: nothing is left of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        with torch.no_grad():
            norm, gate = self.layers[1].mlp_norm, self.layers[1].gate
            norm.weight[3] = 0.0
            gate.weight[:, 3] = 1000.0


def test_matmuls_below_5_db_are_named(caplog) -> None:
    batches = [(token_ids(2, 16, seed),) for seed in range(4)]
    recipe = Recipe(
        name="rtn", schemes={"*": "W8A16"}, passes=("insert-fake-quant", "quantize-weights")
    )
    model = panguq.compile(Blind().eval(), recipe, example_inputs=batches[0], calibration=batches)
    assert len(model.report.warnings) == 1
    assert model.report.warnings[0].startswith("layers.1.gate:linear keeps only ")
    assert "give it more bits" in model.report.warnings[0]
    assert model.report.warnings[0] in [r.message for r in caplog.records]
    others = [m.local_sqnr_db for m in model.report.matmuls if m.name != "layers.1.gate:linear"]
    assert min(db for db in others if db is not None) > 20


def test_the_report_has_every_pass_and_matmul() -> None:
    model = compiled("openpangu", "w8a8")
    names = [p.name for p in model.report.passes]
    expected = [p.name for p in model.recipe.build()]
    expected += ["fuse-latent-attention", "lower-matmuls"]
    assert [n.split("_", 1)[1] for n in names] == expected
    assert [n.split("_")[0] for n in names] == [f"{i:02d}" for i in range(1, len(names) + 1)]
    labels = {label(n) for n in model.graph.graph.nodes}
    assert {m.name for m in model.report.matmuls} <= labels
    assert sum(m.gives_logits for m in model.report.matmuls) == 1
    assert all(math.isfinite(m.local_sqnr_db) for m in model.report.matmuls if m.local_sqnr_db)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": "w8a9"}, RecipeError, "did you mean w8a"),
        ({"recipe": "w8a8", "target": "cpuu"}, LoweringError, "did you mean cpu"),
        ({"recipe": {"schemes": {"*": "FLOAT", "*.q_prj": "FLOAT"}}}, RecipeError, "matches no"),
        ({"recipe": "w8a8", "calibration": []}, InputError, "the calibration data is empty"),
        ({"recipe": "w8a8", "calibration": ["text"]}, InputError, "need a tokenizer"),
        ({"recipe": "w8a8", "calibration": torch.full((2, 16), VOCAB)}, InputError, "vocabulary"),
        ({"recipe": {"schemes": {"*": "W8A8"}, "passes": ["insert-fake-quant"]}}, RecipeError,
         "pass 03 insert-fake-quant needs CALIBRATED"),
    ],
)  # fmt: skip
def test_what_is_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        panguq.compile(shared_model("llama"), **options)


@pytest.mark.parametrize("preset", ["w8a8", "w8a16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(preset, bad) -> None:
    model = make_model("openpangu")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    with pytest.raises(NumericsError) as caught:
        panguq.compile(model, preset, calibration=token_ids(4, 16))
    assert "weight model.layers.1.mlp.up_proj.weight [96, 64] holds 1 value" in caught.value.message
    assert "first seen by pass 01 canonicalize" in caught.value.message


def test_an_activation_that_overflows_is_named() -> None:
    """Finite weights whose products are not: the value is named, and the first pass that ran it."""
    model = make_model("openpangu")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(NumericsError, match=r"activation .*layers\.1.* NaN or Inf") as caught:
        panguq.compile(model, "w8a8", calibration=token_ids(4, 16))
    assert "first seen by pass 03 smoothquant" in caught.value.message


def test_a_sliding_window_is_part_of_the_mask() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = MistralForCausalLM(config).eval()
    compiled = panguq.compile(model, "float")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_sizes_on_which_a_module_branches_are_refused_outside_their_range() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.shape[0] > 3 else x - 1

    compiled = panguq.compile(Branches(), "float", example_inputs=(torch.zeros(6, 4),))
    assert torch.equal(compiled(torch.zeros(5, 4)), torch.ones(5, 4))
    with pytest.raises(InputError, match="the trace holds for 4"):
        compiled(torch.zeros(2, 4))


def test_dtype_casts_weights_and_spares_rotary_tables() -> None:
    model = make_model("llama")
    compiled = panguq.compile(model, "float", dtype=torch.bfloat16)
    assert compiled.dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    tables = [t for n, t in compiled.graph.named_buffers() if n.endswith("inv_freq")]
    assert tables and all(table.dtype == torch.float32 for table in tables)


def test_padding_is_not_observed() -> None:
    ids = torch.ones(2, 16, dtype=torch.long)
    mask = torch.zeros_like(ids)
    mask[:, -5:] = 1
    compiled = panguq.compile(
        shared_model("llama"), "w8a8", calibration=[{"input_ids": ids, "attention_mask": mask}]
    )
    assert str(compiled.report.calibration) == "given by the caller: 2 sequences, 10 tokens"


def test_scaled_logits_are_logits_too() -> None:
    """Granite also scales what it adds: sums of two products that are no rotary embedding."""
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=2.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
    )
    compiled = panguq.compile(GraniteForCausalLM(config).eval(), "w8a16")
    head = next(m for m in compiled.report.matmuls if m.name.startswith("lm_head"))
    assert head.scheme == "FLOAT" and head.gives_logits


def test_the_last_linear_of_another_module_is_quantized() -> None:
    compiled = panguq.compile(nn.Linear(64, 32), "w8a16", example_inputs=(torch.randn(4, 64),))
    assert [m.scheme for m in compiled.report.matmuls] == ["W8A16"]


@pytest.mark.parametrize("preset", ["float", "w8a8"])
def test_a_head_that_is_not_finite_is_named_by_every_recipe(preset) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(NumericsError, match=r"weight lm_head\.weight"):
        panguq.compile(model, preset)


def test_data_that_cannot_be_read_is_refused_before_the_trace(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("panguq.compiler.trace", lambda *_: pytest.fail("traced"))
    with pytest.raises(InputError, match=r"a\.jsonl: no such file"):
        panguq.compile(shared_model("llama"), "w8a8", calibration=str(tmp_path / "a.jsonl"))


def test_a_tokenizer_that_cannot_be_saved_calibrates(caplog, tmp_path) -> None:
    tokenizer = make_tokenizer().backend_tokenizer
    (tmp_path / "a.txt").write_text("ab" * 40)
    compiled = panguq.compile(
        shared_model("llama"), "float", calibration=tmp_path / "a.txt", tokenizer=tokenizer
    )
    assert compiled.report.calibration.source == str(tmp_path / "a.txt")
    assert compiled.report.calibration.first_80_characters == "ab" * 40
    assert "the tokenizer, a Tokenizer, is not saved with the model" in caplog.text
    compiled.save(tmp_path / "out")


def test_a_seed_beyond_what_generators_take() -> None:
    module = torch.nn.Linear(8, 8)
    with pytest.raises(InputError, match="more than 64 bits"):
        panguq.compile(module, "w8a16", example_inputs=(torch.randn(2, 8),), seed=1 << 70)


def test_a_tied_head_is_quantized_beside_the_embeddings() -> None:
    """qwen2's head is its table of embeddings, which stays float: tokens are looked up in it."""
    model = shared_model("qwen2")
    recipe = Recipe.of({**dict(Recipe.named("w8a16")), "head": "W8A16"})
    with shared_traces():
        compiled = panguq.compile(model, recipe)
    [head] = [row for row in compiled.report.matmuls if row.gives_logits]
    assert (head.name.partition(":")[0], head.scheme) == ("lm_head", "W8A16")
    assert head.stored_bytes < sum(t.nbytes for t in model.lm_head.parameters()) / 3
    assert torch.equal(compiled.get_input_embeddings().weight, model.lm_head.weight)
    assert head.local_sqnr_db > 35  # as other matmuls of 8-bit weights
