"""Channel analysis: what may be rescaled, what may not and why, and that it changes nothing."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from panguq.ir.analysis.channel_layout import UNSCALED, Layout
from panguq.ir.analysis.channels import ScaleSite, find_scale_sites
from panguq.ir.analysis.walk import Blocked
from panguq.ir.edit import clone, finish, get_tensor, label, set_tensor, weights_of
from panguq.ir.interface import Interface
from panguq.ir.trace import trace_module
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import PassContext
from panguq.tensors.weight_store import WeightStore

GROUPED = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=64, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)
OPT = dict(
    hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
    max_position_embeddings=64, word_embed_proj_dim=32,
)  # fmt: skip
NEOX = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    vocab_size=64, max_position_embeddings=64,
)  # fmt: skip

MODELS = {
    "llama": (transformers.LlamaConfig, GROUPED),
    "llama-bias": (transformers.LlamaConfig, {**GROUPED, "attention_bias": True}),
    "qwen2-tied": (transformers.Qwen2Config, {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {**GROUPED, "head_dim": 8}),
    "phi3": (transformers.Phi3Config, GROUPED),
    "gemma": (transformers.GemmaConfig, {**GROUPED, "head_dim": 8}),
    "gpt2": (transformers.GPT2Config, GPT2),
    "opt": (transformers.OPTConfig, OPT),
    "gpt-neox": (transformers.GPTNeoXConfig, NEOX),
}
EXPECTED = {  # sites of two layers and, where embeddings are untied, of the final norm
    "llama": {"norm_linear": 5, "value_output": 2, "up_down": 2},
    "llama-bias": {"norm_linear": 5, "value_output": 2, "up_down": 2},
    "qwen2-tied": {"norm_linear": 4, "value_output": 2, "up_down": 2},
    "qwen3": {"norm_linear": 5, "value_output": 2, "up_down": 2},
    "phi3": {"norm_linear": 5, "value_output": 2, "up_down": 2},
    "gemma": {"value_output": 2, "up_down": 2},
    "gpt2": {"norm_linear": 4, "value_output": 2},
    "opt": {"norm_linear": 4, "value_output": 2, "linear_linear": 2},
    "gpt-neox": {"norm_linear": 5, "value_output": 2},
}

Found = tuple[list[ScaleSite], list[Blocked]]


def canonical(gm: fx.GraphModule, interface: Interface) -> tuple[fx.GraphModule, Interface]:
    Canonicalize().run(gm, PassContext(interface, WeightStore()))
    return gm, interface


@functools.cache
def language_model(name: str) -> tuple[fx.GraphModule, Interface]:
    torch.manual_seed(0)
    config, options = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(config(**options)).eval().double()
    with torch.no_grad():  # fresh norms and biases are all 1 and 0: nothing would be tested
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return canonical(*trace_causal_lm(model))


def module(of: nn.Module, *examples: Tensor) -> tuple[fx.GraphModule, Interface]:
    return canonical(
        *trace_module(of.double().eval(), examples or (torch.randn(3, 5, 8).double(),))
    )


def rescaled(gm: fx.GraphModule, sites: list[ScaleSite], seed: int = 1) -> fx.GraphModule:
    """The graph with every site rescaled by random factors between 1/8 and 8."""
    generator = torch.Generator().manual_seed(seed)
    after = clone(gm)
    for site in sites:
        scale = torch.exp2(torch.rand(site.channels, generator=generator).double() * 6 - 3)
        for edit in site.edits:
            weight = get_tensor(after, edit.weight)
            factor = torch.where(edit.channel < 0, 1.0, scale[edit.channel])
            shape = [1] * weight.dim()
            shape[edit.axis] = -1
            factor = (factor if edit.multiply else 1 / factor).view(shape)
            set_tensor(after, edit.weight, weight * factor)
    finish(after)
    return after


def run_two_steps(gm: fx.GraphModule, interface: Interface) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of a prompt of 5 and of 3 more tokens with its cache; and the last cache."""
    generator = torch.Generator().manual_seed(2)
    past = [
        torch.zeros(2, layer.heads, 0, size).double()
        for layer in interface.cache
        for size in (layer.key_dim, layer.value_dim)
    ]
    logits = []
    with torch.no_grad():
        for start, length in ((0, 5), (5, 3)):
            total = start + length
            ids = torch.randint(3, 64, (2, length), generator=generator)
            mask = torch.ones(2, 1, length, total, dtype=torch.bool).tril(start)
            positions = torch.arange(start, total).expand(2, length)
            result, *past = gm(ids, mask, positions, torch.arange(length), *past)
            logits.append(result)
    return logits, past


def assert_equal(before: Tensor, after: Tensor) -> None:
    assert before.shape == after.shape
    assert ((before - after).abs().max() / before.abs().max()).item() < 1e-10


def reason_for(found: Found, source: str) -> str:
    return next(b.reason for b in found[1] if label(b.node) == source)


@pytest.mark.parametrize("name", MODELS)
def test_a_language_model_keeps_its_logits_with_a_cache(name: str) -> None:
    gm, interface = language_model(name)
    sites, _ = find_scale_sites(gm, interface)
    assert Counter(site.kind for site in sites) == EXPECTED[name]
    after = rescaled(gm, sites)
    (first, second), cache = run_two_steps(gm, interface)
    (first_after, second_after), cache_after = run_two_steps(after, interface)
    assert_equal(first, first_after)
    assert_equal(second, second_after)
    keys, values = (list(zip(cache[i::2], cache_after[i::2], strict=True)) for i in (0, 1))
    for old, new in keys:
        assert_equal(old, new)
    for old, new in values:  # or the test would prove nothing about cached values
        assert not torch.allclose(old, new)


@pytest.mark.parametrize("name", MODELS)
def test_each_site_alone_is_exact_and_a_doubled_factor_is_noticed(name: str) -> None:
    gm, interface = language_model(name)
    (logits, _), _ = run_two_steps(gm, interface)
    for site in find_scale_sites(gm, interface)[0]:
        after = rescaled(gm, [site])
        assert_equal(logits, run_two_steps(after, interface)[0][0])
        weight = site.consumers[0].weight
        set_tensor(after, weight, get_tensor(after, weight) * 2)
        with pytest.raises(AssertionError):
            assert_equal(logits, run_two_steps(after, interface)[0][0])


def test_llama_sites() -> None:
    gm, interface = language_model("llama")
    sites, _ = find_scale_sites(gm, interface)
    norm, value, up_norm, up = (s for s in sites if "layers.1" in s.name)
    assert [c.weight.split(".")[-2] for c in norm.consumers] == ["q_proj", "k_proj", "v_proj"]
    assert [c.weight.split(".")[-2] for c in up_norm.consumers] == ["gate_proj", "up_proj"]
    assert (norm.channels, value.channels, up.channels) == (32, 16, 48)
    assert label(value.source) == "model.layers.1.self_attn.v_proj:linear"
    # kv head 0 serves query heads 0 and 1, kv head 1 serves 2 and 3; a head has 8 channels
    heads = [value.consumers[0].channel[8 * h : 8 * h + 8].tolist() for h in range(4)]
    assert heads == [list(range(8)), list(range(8)), list(range(8, 16)), list(range(8, 16))]
    assert {n.target for n in value.values if n.op == "placeholder"} == {"past_value_1"}


def test_reasons_in_llama() -> None:
    gm, interface = language_model("llama")
    found = find_scale_sites(gm, interface)
    layer = "model.layers.0."
    assert "rotary, which mixes the channels of a head" in reason_for(
        found, f"{layer}self_attn.q_proj:linear"
    )
    assert reason_for(found, f"{layer}mlp.gate_proj:linear").endswith(
        f"{layer}mlp:swiglu, which applies silu, which is not homogeneous"
    )
    down = reason_for(found, f"{layer}mlp.down_proj:linear")
    assert "is also read by" in down and "rms_norm, which normalizes over the channels" in down
    assert reason_for(found, "lm_head:linear") == "lm_head:linear is an output of the graph"


def test_tied_embeddings_block_the_final_norm() -> None:
    gm, interface = language_model("qwen2-tied")
    found = find_scale_sites(gm, interface)
    assert reason_for(found, "model.norm:rms_norm") == (
        "weight model.embed_tokens.weight is read by model.embed_tokens:embedding too"
    ) or reason_for(found, "model.norm:rms_norm") == (
        "weight lm_head.weight is read by model.embed_tokens:embedding too"
    )


def test_fused_projections_are_tried_part_by_part() -> None:
    for name, expected in (("gpt2", "c_attn:linear[64:96]"), ("phi3", "qkv_proj:linear[48:64]")):
        gm, interface = language_model(name)
        sites, blocked = find_scale_sites(gm, interface)
        value = next(s for s in sites if s.kind == "value_output")
        assert value.name.endswith(expected)
        rows = next(e for e in value.edits if e.axis == 0 and "weight" in e.weight).channel
        assert rows[rows >= 0].tolist() == list(range(value.channels))
        reasons = [b.reason for b in blocked if b.node is value.source]
        assert len(reasons) == 2 and all(r.startswith("[") for r in reasons)


# --- small modules ------------------------------------------------------------------------------


class Chain(nn.Module):
    """norm ─► first ─► activation ─► second, with hooks for what the cases below add."""

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)
        self.gain = nn.Parameter(torch.randn(12))
        self.shift = nn.Parameter(torch.randn(12))
        self.activation = getattr(functional, activation)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.add_(torch.randn(8) * 0.1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return x + self.second(self.activation(self.first(self.norm(x))))


class ReadTwice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return functional.softmax(normed, -1) + self.second(functional.gelu(self.first(normed)))


class NormTapped(Chain):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        normed = self.norm(x)
        return normed, self.second(functional.gelu(self.first(normed)))


class ResidualTapped(Chain):
    """fc1's output could be rescaled, were the sum it enters not returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stream = self.first(x) + self.first(x.flip(1))
        return stream, self.second(functional.relu(stream))


class ResidualClosed(Chain):
    """Two linears and a stored tensor enter one sum: they can only be rescaled together."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(functional.relu(self.first(x) + self.other(x) + self.shift))


class WithGain(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.gain * 3.0 / 2.0)


class AddsConstant(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + 1.0)


class SharedInAnotherRole(Chain):
    """One square weight stands before and behind the relu."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(functional.relu(self.square(x)))


class SharedElsewhere(Chain):
    """The norm's reader shares its weight with a linear that the norm does not feed."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.first(self.norm(x))) + functional.gelu(self.first(x))


class SharedAlike(Chain):
    """Both linears with the shared weight read the same norm."""

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        again = functional.linear(normed * 2.0, self.first.weight)
        return functional.gelu(self.first(normed)) + functional.gelu(again)


class SharedNorm(Chain):
    """One norm is applied twice; only one of its results reaches a linear."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.first(self.norm(x))).sum(-1, keepdim=True) + self.norm(x * 2)


class TwoLayouts(Chain):
    """The sum of a value and its reverse in channels cannot carry one scale."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        swapped = y.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)
        return self.second(functional.relu(y + swapped))


class MovedHeads(Chain):
    """Channels are split, permuted and merged on the way."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).unflatten(-1, (3, 4)).permute(0, 3, 1, 2)
        return self.second(functional.relu(y).permute(0, 2, 1, 3).flatten(-2))


class ChannelsAsTokens(Chain):
    """The channels end up where the linear sees tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(self.first(x).transpose(1, 2))


class WrittenOutAttention(nn.Module):
    """Grouped attention in matmuls: 4 query heads, 2 key and value heads of 2 channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (2, 2)).transpose(1, 2).repeat_interleave(2, dim=1)
        v = self.v(x).unflatten(-1, (2, 2)).transpose(1, 2)
        v = v[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
        weights = functional.softmax(q @ k.transpose(-1, -2), dim=-1)
        return self.o((weights @ v).transpose(1, 2).flatten(-2))


class EncoderAttention(WrittenOutAttention):
    """Attention without a mask, which canonicalize does not raise."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (2, 2)).transpose(1, 2) for p in (self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(-2))


CASES: list[tuple[nn.Module, list[str], dict[str, str]]] = [
    (Chain("relu"), ["norm_linear", "linear_linear"], {"second": "add is an output of the graph"}),
    (Chain("gelu"), ["norm_linear"], {"first": "gelu, which is not homogeneous"}),
    (Chain("silu"), ["norm_linear"], {"first": "silu, which is not homogeneous"}),
    (Chain("tanh"), ["norm_linear"], {"first": "tanh, which is not homogeneous"}),
    (ReadTwice(), [], {"norm": "norm:layer_norm is also read by softmax, which is not homog"}),
    (NormTapped(), [], {"norm": "norm:layer_norm is an output of the graph"}),
    (ResidualTapped(), [], {"first": "add is an output of the graph"}),
    (ResidualClosed(), ["linear_linear"], {}),
    (WithGain(), ["linear_linear"], {}),
    (AddsConstant(), [], {"first": "add adds a constant"}),
    (SharedInAnotherRole(), [], {"square": "weight square.weight is read by square:linear"}),
    (SharedElsewhere(), [], {"norm": "weight first.weight is read by first:linear"}),
    (SharedAlike(), ["norm_linear"], {}),
    (SharedNorm(), [], {"norm": "weight norm.weight is read by norm:layer_norm"}),
    (TwoLayouts(), [], {"first": "would need two different scales"}),
    (MovedHeads(), ["linear_linear"], {}),
    (ChannelsAsTokens(), [], {"first": "meets the channels in more than the last dim"}),
    (EncoderAttention(), ["value_output"], {"q": "would change the attention scores"}),
    (WrittenOutAttention(), ["value_output"], {"q": "sums over the channels", "k": "sums over"}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: type(c[0]).__name__ + str(len(c[2])))
def test_small_modules(case: tuple[nn.Module, list[str], dict[str, str]]) -> None:
    of, kinds, reasons = case
    gm, interface = module(of)
    sites, blocked = find_scale_sites(gm, interface)
    assert [site.kind for site in sites] == kinds
    for path, reason in reasons.items():
        given = [b.reason for b in blocked if label(b.node).startswith(f"{path}:")]
        assert any(reason in text for text in given), given
    before = weights_of(gm)
    after = rescaled(gm, sites)
    x = torch.randn(2, 5, 8).double()
    for expected, actual in zip(gm(x), after(x), strict=True):
        assert_equal(expected, actual)
    changed = [n for n, t in weights_of(after).items() if not torch.equal(t, before[n])]
    assert bool(changed) == bool(kinds)


def test_tied_values_are_named_once() -> None:
    """The sum's other linear is part of the first one's site, not a site of its own."""
    gm, interface = module(ResidualClosed())
    ((site,), blocked) = find_scale_sites(gm, interface)
    assert {e.weight for e in site.edits if not e.multiply} == {
        "first.weight", "first.bias", "other.weight", "other.bias", "shift",
    }  # fmt: skip
    assert [label(b.node) for b in blocked] == ["second:linear"]


# --- layouts ------------------------------------------------------------------------------------


def factorizations(size: int) -> st.SearchStrategy[list[int]]:
    def extend(rest: int) -> st.SearchStrategy[list[int]]:
        divisors = [d for d in range(1, rest + 1) if rest % d == 0]
        return st.sampled_from(divisors).flatmap(
            lambda d: st.just([d]) if d == rest else extend(rest // d).map(lambda f: [d, *f])
        )

    return extend(size)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_layouts_follow_what_tensors_do(data: st.DataObject) -> None:
    """Any chain of ops on a tensor of channel numbers is what the layout says, or refused."""
    channels = data.draw(st.sampled_from([6, 8, 12, 24]))
    hidden = data.draw(st.booleans())
    numbers = torch.arange(channels) + (torch.arange(channels) < 2) * (UNSCALED if hidden else 0)
    tensor = numbers.expand(2, channels)
    layout = Layout.last(numbers, 2)
    for _ in range(data.draw(st.integers(1, 5))):
        action = data.draw(st.sampled_from(["reshape", "permute", "repeat", "slice"]))
        if action == "reshape":
            shape = data.draw(factorizations(tensor.numel()))
            new = layout.reshaped(list(tensor.shape), shape)
            if new is None:
                continue
            tensor, layout = tensor.reshape(shape), new
        elif action == "permute":
            dims = data.draw(st.permutations(range(tensor.dim())))
            tensor, layout = tensor.permute(dims), layout.permuted(dims)
        else:
            dim = data.draw(st.integers(0, tensor.dim() - 1))
            index = torch.arange(tensor.shape[dim])
            if action == "repeat" and tensor.numel() < 200:
                index = index.repeat_interleave(2)
            elif action == "slice":
                index = index[data.draw(st.integers(0, len(index) - 1)) :]
            tensor, layout = tensor.index_select(dim, index), layout.taken(dim, index)
    assert torch.equal(layout.grid().expand(tensor.shape), tensor)
    assert layout.is_unscaled == bool((tensor < 0).all())
    assert torch.equal(layout.channels(), tensor[tensor >= 0].unique())


@settings(max_examples=100, deadline=None)
@given(factorizations(24), factorizations(24))
def test_reshape_there_and_back_is_the_same_layout(first: list[int], second: list[int]) -> None:
    layout = Layout.last(torch.arange(24), 2)
    there = layout.reshaped([5, 24], [5, *first])
    assert there is not None
    across = there.reshaped([5, *first], [5, *second])
    assert across is not None
    back = across.reshaped([5, *second], [5, 24])
    assert back is not None and back.matches(layout)


def test_a_reshape_that_mixes_channels_is_refused() -> None:
    transposed = Layout.last(torch.arange(6), 2).reshaped([2, 6], [2, 2, 3])
    assert transposed is not None
    merged = transposed.permuted([0, 2, 1]).reshaped([2, 3, 2], [2, 6])
    assert merged is not None  # a known permutation of the channels
    assert merged.grid().flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert merged.reshaped([2, 6], [2, 3, 2]) is not None
    assert merged.reshaped([2, 6], [2, 2, 3]) is None  # 0 3 1 | 4 2 5 is no sum of two steps
