"""One graph serves every batch, sequence and past, and computes what the eager model computes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

import panguq
from panguq.data.inputs import prepare
from panguq.errors import InputError, TraceError
from panguq.ir.interface import Interface
from panguq.ir.kv_cache import held_tensors, layer_tensors
from panguq.ir.run.interpret import run
from panguq.ir.text.printer import print_graph
from panguq.ir.trace import trace_module
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import PassContext
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import (
    FAMILIES,
    canonical,
    hand_written,
    make_model,
    shared_model,
    token_ids,
    traced,
)

GRAPHS = {"raw": traced, "canonical": canonical}


def assert_logits_equal(expected: Tensor, actual: Tensor) -> None:
    """Difference at most 1e-4 of the largest logit."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert (expected - actual).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("wrong", [lambda y: 2 * y, lambda y: y + 1, lambda y: y[:1], torch.neg])
def test_the_comparison_fails_where_it_should(wrong) -> None:
    logits = torch.randn(2, 3, 8)
    assert_logits_equal(logits, logits.clone())
    with pytest.raises(AssertionError):
        assert_logits_equal(logits, wrong(logits))


def eager_cache(model: nn.Module, batch: int, past: int) -> transformers.DynamicCache:
    if past == 0:
        return transformers.DynamicCache()
    with torch.no_grad():
        return model(token_ids(batch, past, seed=7), use_cache=True).past_key_values


def check_against_eager(
    gm: fx.GraphModule, interface: Interface, model: nn.Module, batch: int, seq: int, past: int
) -> None:
    cache = eager_cache(model, batch, past)
    inputs = prepare(
        interface,
        token_ids(batch, seq),
        past=held_tensors(interface.cache, copy.deepcopy(cache), seq),
    )
    with torch.no_grad():
        expected = model(token_ids(batch, seq), past_key_values=cache, use_cache=True)
    logits, *grown = run(gm, inputs)
    assert_logits_equal(expected.logits, logits)
    cached = layer_tensors(interface.cache, expected.past_key_values)
    for wanted, tensor in zip(cached, grown, strict=True):
        assert_logits_equal(wanted, tensor)


@pytest.mark.parametrize("stage", GRAPHS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("batch", "seq", "past"),
    [(1, 1, 0), (1, 1, 1), (1, 2, 0), (2, 1, 64), (3, 64, 0), (3, 64, 64), (1, 64, 1), (2, 5, 7)],
)
def test_logits_and_cache_equal_eager(family, stage, batch, seq, past) -> None:
    check_against_eager(*GRAPHS[stage](family), shared_model(family), batch, seq, past)


@given(
    family=st.sampled_from(FAMILIES),
    batch=st.integers(1, 3),
    seq=st.integers(1, 64),
    past=st.integers(0, 64),
)
@settings(max_examples=40)
def test_any_size_equals_eager(family, batch, seq, past) -> None:
    check_against_eager(*canonical(family), shared_model(family), batch, seq, past)


@pytest.mark.parametrize("stage", GRAPHS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("seq", "past"), [(6, 0), (1, 6), (4, 5)])
def test_left_padding(family, stage, seq, past) -> None:
    """Padded positions may hold anything; all others equal the eager model's."""
    (gm, interface), model = GRAPHS[stage](family), shared_model(family)
    ids = token_ids(3, past + seq)
    padding = torch.tensor([0, 2, past or 4])
    mask = (torch.arange(past + seq) >= padding[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=positions).logits[:, past:]
    cache: list[Tensor] = []
    if past:
        head = prepare(interface, ids[:, :past], mask[:, :past], positions[:, :past])
        cache = list(run(gm, head)[1:])
    inputs = prepare(interface, ids[:, past:], mask, positions[:, past:], past=cache)
    real = mask[:, past:].bool()
    assert_logits_equal(expected[real], run(gm, inputs)[0][real])


def test_padding_changes_the_answer_where_it_is_ignored() -> None:
    """The mask is honoured: with all ones the padded row's logits would differ."""
    gm, interface = canonical("llama")
    ids, mask = token_ids(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    positions = torch.arange(6)[None]
    masked = run(gm, prepare(interface, ids, mask, positions))[0]
    plain = run(gm, prepare(interface, ids, None, positions))[0]
    with pytest.raises(AssertionError):
        assert_logits_equal(plain[:, 2:], masked[:, 2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_wanted_logits_are_computed(family) -> None:
    gm, interface = canonical(family)
    every = run(gm, prepare(interface, token_ids(2, 9)))[0]
    last = run(gm, prepare(interface, token_ids(2, 9), logits_to_keep=2))[0]
    assert_logits_equal(every[:, -2:], last)
    picked = prepare(interface, token_ids(2, 9), logits_to_keep=torch.tensor([0, 4]))
    assert_logits_equal(every[:, [0, 4]], run(gm, picked)[0])


# --- generate -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """An eager model and its float compile."""
    model = make_model(request.param)
    return model, panguq.compile(model, "float")


def generated(model, ids: Tensor, mask: Tensor) -> list[list[int]]:
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False
    ).tolist()


def test_greedy_tokens_are_the_eager_models(pair) -> None:
    ids = token_ids(1, 9)
    eager, compiled = (generated(model, ids, torch.ones_like(ids)) for model in pair)
    assert compiled == eager
    assert len(eager[0]) == 29


def test_greedy_tokens_with_left_padding(pair) -> None:
    ids = token_ids(3, 9)
    mask = (torch.arange(9) >= torch.tensor([0, 3, 6])[:, None]).long()
    eager, compiled = (generated(model, ids * mask, mask) for model in pair)
    assert compiled == eager
    assert len({tuple(row[9:]) for row in eager}) > 1  # the rows are not all alike


def test_padding_without_positions_is_numbered_as_the_model_does(pair) -> None:
    """Called with a mask alone: OPT counts real tokens, the others every position."""
    ids, mask = token_ids(2, 6), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        eager, compiled = (model(input_ids=ids, attention_mask=mask).logits for model in pair)
    assert_logits_equal(eager[mask.bool()], compiled[mask.bool()])


def test_beams_are_the_eager_models() -> None:
    """Beam search reorders the cache between steps."""
    model = make_model("llama")
    compiled = panguq.compile(model, "float")
    options = dict(max_new_tokens=8, num_beams=3, do_sample=False)
    eager, ours = (m.generate(input_ids=token_ids(2, 5), **options) for m in (model, compiled))
    assert torch.equal(eager, ours)


# --- what tracing leaves alone ------------------------------------------------------------------


def test_the_callers_model_is_unchanged() -> None:
    model = make_model("llama").train()
    model.set_attn_implementation("eager")
    config = copy.deepcopy(model.config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = {name: id(tensor) for name, tensor in model.named_parameters()}
    gradients = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    panguq.compile(model, "w8a8", calibration=token_ids(2, 16))
    assert model.training and all(module.training for module in model.modules())
    assert model.config._attn_implementation == "eager"
    assert model.config.to_dict() == config.to_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == kept
    assert {name: t.requires_grad for name, t in model.named_parameters()} == gradients


def test_the_trace_shares_the_models_weights() -> None:
    model = shared_model("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    gm, _ = traced("llama")
    assert gm.get_buffer(name).data_ptr() == model.get_parameter(name).data_ptr()


def test_inputs_and_outputs_are_named() -> None:
    _, interface = traced("llama")
    assert interface.inputs[:4] == (
        "input_ids", "attention_mask", "position_ids", "logit_positions",
    )  # fmt: skip
    assert interface.inputs[4:] == ("past_key_0", "past_value_0", "past_key_1", "past_value_1")
    assert interface.outputs == ("logits", "key_0", "value_0", "key_1", "value_1")
    assert interface.input_shapes["attention_mask"] == ("batch", 1, "seq", "past + seq")
    assert interface.input_shapes["past_value_1"] == ("batch", 2, "past", 16)
    assert (interface.vocab_size, interface.float_dtype) == (96, "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_only_learned_positions_limit_the_length(family) -> None:
    _, interface = traced(family)
    assert interface.max_positions == (256 if family in ("opt", "gpt2") else None)
    assert interface.positions_from_mask == (family == "opt")


# --- a model that is not from transformers ------------------------------------------------------


@pytest.fixture(scope="module")
def hand_written_graphs() -> dict[str, tuple[fx.GraphModule, Interface]]:
    example = (token_ids(3, 5),)
    raw, canonicalized = (trace_module(hand_written(), example) for _ in range(2))
    gm, interface = canonicalized
    Canonicalize().run(gm, PassContext(interface, WeightStore()))
    return {"raw": raw, "canonical": canonicalized}


@pytest.mark.parametrize("stage", GRAPHS)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("seq", [1, 2, 17, 64])
def test_a_hand_written_decoder(hand_written_graphs, stage, batch, seq) -> None:
    gm, interface = hand_written_graphs[stage]
    ids = token_ids(batch, seq)
    with torch.no_grad():
        expected = hand_written()(ids)
    assert_logits_equal(expected, run(gm, {interface.inputs[0]: ids})[0])


def test_a_hand_written_decoder_is_raised_to_canonical_ops(hand_written_graphs) -> None:
    text = print_graph(hand_written_graphs["canonical"][0])
    counts = [text.count(f"= panguq.{op}(") for op in ("attention", "rms_norm", "swiglu")]
    assert counts == [2, 2, 2]


class InPlace(nn.Module):
    """What dropping a copy, or ignoring a write, would change."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.mul_(3).relu_()
        y[:, 0] = 7.0
        return x + y


def test_writes_in_place_become_values() -> None:
    gm, interface = trace_module(InPlace(), (torch.randn(3, 4),))
    Canonicalize().run(gm, PassContext(interface, WeightStore()))
    x = torch.randn(2, 5)
    expected = InPlace()(x.clone())
    given_x = x.clone()
    assert torch.equal(run(gm, {interface.inputs[0]: given_x})[0], expected)
    assert torch.equal(given_x, x)
    calls = [n.target for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert calls and not any(op._schema.is_mutable for op in calls)


class TwoResults(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x @ y


def test_a_module_with_several_inputs_and_results() -> None:
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    gm, interface = trace_module(TwoResults(), (x, y))
    assert (interface.inputs, interface.returns) == (("x", "y"), "tuple")
    results = run(gm, {"x": x[:2], "y": y})
    assert torch.equal(results[0], x[:2] + 1) and torch.equal(results[1], x[:2] @ y)


class FixedBatch(nn.Module):
    """A Python loop over a size bakes it in."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = x + 1
        return x


def test_a_size_that_was_baked_in_is_a_number() -> None:
    _, interface = trace_module(FixedBatch(), (torch.randn(3, 5),))
    assert interface.input_shapes == {"x": (3, "x_1")}


# --- errors -------------------------------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.choice = Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.choice(self.first(x))


def test_control_flow_on_values_names_the_module() -> None:
    with pytest.raises(TraceError, match=r"cannot trace module choice \(Branch\)") as caught:
        trace_module(Holder(), (torch.randn(3, 4),))
    assert "may depend on tensor values" in caught.value.hint


def test_control_flow_inside_a_language_model_names_the_module() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.act_fn = Branch()
    with pytest.raises(TraceError, match=r"module model\.layers\.1\.mlp\.act_fn \(Branch\)"):
        trace_causal_lm(model)


class OwnGraph(nn.Module):
    """A part of the model becomes a graph of its own, by one of torch's ways to do that."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "cond":
            return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x.T


@pytest.mark.parametrize("way", ["cond", "autocast"])
def test_a_graph_in_a_graph_names_the_module(way) -> None:
    with pytest.raises(TraceError, match=rf"cannot trace module 1: \w*{way} runs a part") as caught:
        trace_module(nn.Sequential(nn.Linear(4, 4), OwnGraph(way)), (torch.randn(3, 4),))
    assert "docs/contributing/when-a-model-does-not-trace.md" in caught.value.hint
    with pytest.raises(TraceError, match="cannot trace the model: "):
        trace_module(OwnGraph(way), (torch.randn(3, 4),))


@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (0, 4)])
def test_examples_of_size_one_are_refused(shape) -> None:
    with pytest.raises(TraceError, match=r"example input 0 of Branch .* at least 2"):
        trace_module(Branch(), (torch.zeros(shape),))


def test_an_example_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TraceError, match="example input 1"):
        trace_module(TwoResults(), (torch.randn(3, 4), 5))


@pytest.mark.parametrize("thing", ["gpt2", None, {"a": 1}, torch.zeros(2), functional.relu])
def test_what_is_no_model_is_refused(thing) -> None:
    with pytest.raises(InputError, match=r"not a torch\.nn\.Module"):
        panguq.compile(thing, "float")


def test_an_encoder_decoder_model_is_refused() -> None:
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=32
    )
    with pytest.raises(TraceError, match="encoder-decoder"):
        panguq.compile(transformers.T5ForConditionalGeneration(config), "float")


def test_another_module_needs_example_inputs() -> None:
    with pytest.raises(InputError, match="example_inputs="):
        panguq.compile(nn.Linear(4, 4), "float")
