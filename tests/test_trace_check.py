"""A compile asks the model itself: what its graph does not compute is refused by name."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import panguq
from panguq import trace_check
from panguq.errors import InputError, TraceError
from panguq.ir.edit import get_tensor, set_tensor
from panguq.ir.kv_cache import CACHE_NAME
from panguq.ir.length_limits import attention_windows
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.trace_check import check_causal_lm, check_module
from panguq.tracing import trace
from tests.model_shelf import GROUPED, make_model, shared_model, token_ids, traced

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)


# --- writes -------------------------------------------------------------------------------------


class Counts(Base):
    """Writes to a buffer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


class Scratch(Counts):
    """Overwrites a buffer before it reads it."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls.copy_(x.sum())
        return self.inner(x) + self.calls


class Accumulates(Counts):
    """Every call sees what the calls before left."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.calls


class WritesInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.inner(x)


@pytest.mark.parametrize(
    ("module", "said"), [(Counts, "updates calls"), (Scratch, None), (WritesInput, "its input x")]
)
def test_a_write_does_not_change_which_tensor_comes_back(module, said) -> None:
    model = module().eval()
    compiled = panguq.compile(model, "float", example_inputs=(X.clone(),))
    expected, given = module().eval()(X.clone()), X.clone()
    assert torch.allclose(compiled(given), expected, atol=1e-6)
    assert torch.equal(given, X)
    assert not hasattr(model, "calls") or model.calls == 0  # the caller's model is unchanged
    warnings = " ".join(compiled.report.warnings)
    assert said in warnings if said else not warnings


def test_a_state_between_calls_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match="Accumulates has a state: its result reads calls"):
        panguq.compile(Accumulates().eval(), "float", example_inputs=(X,))


# --- randomness ---------------------------------------------------------------------------------


class AlwaysDrops(Base):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.inner(x), 0.5)


class Noise(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.rand_like(x)


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + 1


@pytest.mark.parametrize(("module", "op"), [(AlwaysDrops, "dropout"), (Noise, "rand_like")])
def test_a_random_module_is_refused_by_name(module, op) -> None:
    with pytest.raises(TraceError, match=rf"Holder is random by itself: part calls aten.{op}"):
        panguq.compile(Holder(module()).eval(), "float", example_inputs=(X,))


def test_dropout_that_is_off_is_not_random() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    compiled = panguq.compile(model.train(), "float", example_inputs=(X,))
    assert torch.allclose(compiled(X), model.eval()(X), atol=1e-6)


class RandomInPython(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * random.random()


class StateInPython(Base):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.calls


@pytest.mark.parametrize("module", [RandomInPython, StateInPython])
def test_what_no_op_shows_is_found_by_running_twice(module) -> None:
    with pytest.raises(TraceError, match=f"{module.__name__} gives two results for one input"):
        panguq.compile(module().eval(), "float", example_inputs=(X,))


# --- what is no tensor --------------------------------------------------------------------------


@pytest.mark.parametrize(("extra", "said"), [(None, "None"), (3, "3"), ("size", "a size")])
def test_a_result_that_is_no_tensor_is_refused(extra, said) -> None:
    class Extra(Base):
        def forward(self, x: Tensor):
            return self.inner(x), x.shape[0] if extra == "size" else extra

    with pytest.raises(TraceError, match=f"output 1 of Extra is {said}, not a tensor"):
        panguq.compile(Extra().eval(), "float", example_inputs=(X,))


def test_examples_that_the_module_does_not_take_are_refused() -> None:
    with pytest.raises(TraceError, match="itself fails on the example inputs"):
        panguq.compile(Base().inner, "float", example_inputs=(X.double(),))


# --- the comparison with the model --------------------------------------------------------------


def shift(gm, name: str) -> None:
    set_tensor(gm, name, get_tensor(gm, name) * 1.01)


def test_a_graph_of_other_values_names_the_first_module() -> None:
    gm, interface = traced("llama")
    check_causal_lm(shared_model("llama"), gm, interface)
    shift(gm, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(TraceError, match=r"is model\.layers\.1\.mlp\.up_proj \(Linear\)"):
        check_causal_lm(shared_model("llama"), gm, interface)


def test_a_model_that_loses_its_past_is_found() -> None:
    gm, interface = traced("llama")
    model = make_model("llama")

    class Forgets(type(model)):
        def forward(self, input_ids=None, position_ids=None, **given):
            for layer in getattr(given.get(CACHE_NAME), "layers", ()):
                layer.keys = torch.zeros_like(layer.keys)
            return super().forward(input_ids, position_ids=position_ids, **given)

    check_causal_lm(model, gm, interface)
    model.__class__ = Forgets
    with pytest.raises(TraceError, match="on tokens after a past it differs"):
        check_causal_lm(model, gm, interface)


def test_of_a_large_model_the_padded_prompt_is_compared(monkeypatch) -> None:
    monkeypatch.setattr(trace_check, "LARGE_BYTES", 0)
    gm, interface = traced("llama")
    check_causal_lm(shared_model("llama"), gm, interface)
    shift(gm, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(TraceError, match=r"a padded prompt .* is model\.layers\.1\.mlp\.up_proj"):
        check_causal_lm(shared_model("llama"), gm, interface)


def test_a_module_of_other_values_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    gm, interface = trace(model, (X,), None)
    check_module(model, gm, interface, (X,))
    shift(gm, "1.weight")
    with pytest.raises(TraceError, match=r"on the example inputs .* is 1 \(Linear\)"):
        check_module(model, gm, interface, (X,))


def mpt() -> nn.Module:
    config = transformers.MptConfig(
        d_model=64, n_heads=4, n_layers=2, vocab_size=96, max_seq_len=64
    )
    torch.manual_seed(0)
    return transformers.MptForCausalLM(config).eval()


def test_a_mask_that_is_read_the_other_way_is_found() -> None:
    """MPT hides where others attend, so the graph's own mask means the opposite to it."""
    model = mpt()
    gm, interface = trace_causal_lm(model)
    with pytest.raises(TraceError, match=r"first module that differs is transformer\.blocks\.0"):
        check_causal_lm(model, gm, interface)


def test_a_model_with_a_mask_of_its_own_makes_it_of_the_tokens() -> None:
    model = mpt()
    equal_to_eager(model, panguq.compile(model, "float"), 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_graph_of_a_narrow_model_is_its_own(dtype) -> None:
    model = make_model("llama").to(dtype)
    gm, _ = trace(model, None, dtype)
    assert get_tensor(gm, "lm_head.weight").dtype == dtype


# --- attention that is not plain causal ---------------------------------------------------------


def build(kind: str, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**GROUPED, **settings})
    name = kind.removesuffix("Text") + "ForCausalLM"
    return getattr(transformers, name)(config).eval()


def test_a_module_that_attends_both_ways_is_refused() -> None:
    model = make_model("llama")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(TraceError, match=r"is_causal is False in model\.layers\.1\.self_attn"):
        panguq.compile(model, "float")


def test_a_module_that_never_runs_may_attend_as_it_likes() -> None:
    """A decoder on its own has attention to an encoder that it never calls."""
    sizes = dict(d_model=64, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64)
    model = build("Bart", **sizes, num_hidden_layers=1, num_key_value_heads=4)
    assert model.model.decoder.layers[0].encoder_attn.is_causal is False
    equal_to_eager(model, panguq.compile(model, "float"), 9)


def test_a_forward_that_branches_on_the_length_is_refused() -> None:
    with pytest.raises(TraceError, match="DogeForCausalLM: its forward branches on these sizes"):
        panguq.compile(build("Doge"), "float")


def test_a_window_that_no_mask_has_is_none() -> None:
    """Moshi's config has a window of which its forward knows nothing."""
    settings = dict(num_codebooks=2, ffn_dim=64, sliding_window=8, audio_vocab_size=64)
    model = build("Moshi", **settings)
    assert attention_windows(model, model.config) == ({}, [])


def test_scores_are_capped() -> None:
    """Gemma 2 has no attention through scaled_dot_product_attention."""
    kinds = ["sliding_attention", "full_attention"]
    settings = dict(head_dim=16, layer_types=kinds, sliding_window=8, attn_logit_softcapping=0.5)
    model = build("Gemma2", **settings)
    compiled = panguq.compile(model, "float")
    equal_to_eager(model, compiled, 20)
    attention = torch.ops.panguq.attention.default
    caps = [n.args[6] for n in compiled.graph.graph.nodes if n.target is attention]
    assert caps == [0.5, 0.5]


def test_layers_of_another_kind_are_refused() -> None:
    model = build("Qwen2")
    model.config.layer_types = ["indexed_attention", "full_attention"]
    with pytest.raises(TraceError, match=r"'indexed_attention': module model\.layers\.0 \("):
        panguq.compile(model, "float")


def equal_to_eager(model, compiled, tokens: int) -> None:
    ids = token_ids(1, tokens)
    with torch.no_grad():
        expected = model(ids).logits
    assert (compiled(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_window_holds_in_the_layers_that_have_it() -> None:
    settings = dict(use_sliding_window=True, sliding_window=8)
    windowed = build("Qwen2", **settings, max_window_layers=1)
    compiled = panguq.compile(windowed, "float")
    equal_to_eager(windowed, compiled, 20)
    plain = build("Qwen2", **settings, max_window_layers=2)
    equal_to_eager(plain, panguq.compile(plain, "float"), 20)
    with pytest.raises(AssertionError):
        equal_to_eager(plain, compiled, 20)


def test_generation_goes_on_beyond_the_window() -> None:
    """transformers' cache drops what a layer's window has left behind; a graph's does not."""
    model = build("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    model.generation_config.eos_token_id = None
    compiled = panguq.compile(model, "float")
    settings = dict(max_new_tokens=8, do_sample=False)
    ids = token_ids(2, 6)
    for kind in (None, "static"):
        settings["cache_implementation"] = kind
        assert torch.equal(compiled.generate(ids, **settings), model.generate(ids, **settings))


def test_a_window_of_a_model_that_is_not_transformers_own_limits_the_length() -> None:
    """What it does beyond its window no short run can show."""
    windowed = type("Other", (transformers.Qwen2ForCausalLM,), {"__module__": "other"})
    config = transformers.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    torch.manual_seed(0)
    model = windowed(config).eval()
    compiled = panguq.compile(model, "float")
    equal_to_eager(model, compiled, 8)
    with pytest.raises(InputError, match=r"8 positions \(beyond its sliding window"):
        compiled(token_ids(1, 9))


# --- rotary frequencies that depend on the length -----------------------------------------------


def test_dynamic_frequencies_are_served_up_to_where_they_change() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = build("Llama", max_position_embeddings=32, rope_parameters=rope)
    with torch.no_grad():
        model(token_ids(1, 48))  # now the model holds the frequencies of 48 tokens
    compiled = panguq.compile(model, "float")
    equal_to_eager(model, compiled, 31)
    equal_to_eager(build("Llama", max_position_embeddings=32, rope_parameters=rope), compiled, 32)
    with pytest.raises(InputError, match=r"32 positions \(beyond, its dynamic rotary"):
        compiled(token_ids(1, 33))


def test_frequencies_of_two_lengths_are_right_at_both() -> None:
    """LongRoPE: one set up to the first length, another beyond."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 32, "short_factor": [1.0] * 8,
        "long_factor": [float(i) for i in range(1, 9)],
    }  # fmt: skip
    model = build("Llama", max_position_embeddings=128, rope_parameters=rope)
    compiled = panguq.compile(model, "float")
    for tokens in (8, 32, 33, 64, 20):
        equal_to_eager(model, compiled, tokens)
