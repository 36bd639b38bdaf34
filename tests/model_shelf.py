"""Tiny random models that the tests share, and their traces, made once a session."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import transformers
from torch import Tensor, fx, nn
from torch.nn import functional

from panguq.data.inputs import prepare, takes_empty_mask
from panguq.ir.edit import clone, module_path
from panguq.ir.interface import Interface
from panguq.ir.properties import TRACED, Property
from panguq.ir.trace import trace_module
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import Pass, PassContext
from panguq.passes.pipeline.runner import Instrument, PassRecord, Runner
from panguq.tensors.weight_store import WeightStore

VOCAB = 96
GROUPED = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=256, pad_token_id=0,
    bos_token_id=1, eos_token_id=None,
)  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "qwen2": transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    # openPangu: bias on q, k, v and o, none in the MLP.
    "openpangu": transformers.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=False),
    "opt": transformers.OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
        max_position_embeddings=256, word_embed_proj_dim=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=VOCAB, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    ),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
EXPERTS = "qwen3_moe"
CONFIGS[EXPERTS] = transformers.Qwen3MoeConfig(
    **GROUPED, head_dim=16, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2
)


def make_model(family: str, seed: int = 0) -> nn.Module:
    """A new model; fresh norms and biases would be all 1 and 0, so every weight is shaken."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@functools.cache
def shared_model(family: str) -> nn.Module:
    """One model a family, never to be changed."""
    return make_model(family)


@functools.cache
def _traced(family: str) -> tuple[fx.GraphModule, Interface]:
    return trace_causal_lm(shared_model(family))


def traced(family: str) -> tuple[fx.GraphModule, Interface]:
    """A copy of the family's raw trace."""
    gm, interface = _traced(family)
    return clone(gm), interface


@functools.cache
def _canonical(family: str) -> fx.GraphModule:
    gm, interface = traced(family)
    Canonicalize().run(gm, PassContext(interface, WeightStore()))
    return gm


def canonical(family: str) -> tuple[fx.GraphModule, Interface]:
    """A copy of the family's canonicalized trace."""
    return clone(_canonical(family)), _traced(family)[1]


def token_ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random ids `[batch, tokens]` without the padding token 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, tokens), generator=generator)


def family_context(family: str, sequences: int = 4, tokens: int = 32) -> PassContext:
    """A context with calibration batches and a probe for the family's graph."""
    gm, interface = _canonical(family), _traced(family)[1]
    empty = takes_empty_mask(gm)
    rows = [token_ids(1, tokens, seed) for seed in range(sequences)]
    batches = [prepare(interface, row, empty_mask=empty) for row in rows]
    return PassContext(interface, WeightStore(), batches=batches, probe=batches[0])


class SelfAttention(nn.Module):
    """Causal attention with one fused projection."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, hidden = x.shape
        parts = self.qkv(x).view(batch, seq, 3, self.heads, hidden // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, seq, hidden))


class HandWrittenLayer(nn.Module):
    """A pre-norm block that adds in place, as much hand-written code does."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = SelfAttention(hidden, heads)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate = nn.Linear(hidden, 2 * hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * hidden, bias=False)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y = self.mlp_norm(x)
        x += self.down(functional.silu(self.gate(y)) * self.up(y))
        return x


class HandWritten(nn.Module):
    """A small decoder that owes nothing to transformers: ids `[batch, seq]` to logits."""

    def __init__(self, hidden: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, hidden)
        self.layers = nn.ModuleList(HandWrittenLayer(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@functools.cache
def hand_written() -> nn.Module:
    """The one hand-written decoder, never to be changed."""
    torch.manual_seed(0)
    return HandWritten().eval()


# --- tiny modules through single passes ---------------------------------------------------------


def trace_tiny(module: nn.Module, *examples: Tensor) -> tuple[fx.GraphModule, Interface]:
    """The canonical graph of a module of a few ops."""
    gm, interface = trace_module(module.eval(), examples)
    Canonicalize().run(gm, PassContext(interface, WeightStore()))
    return gm, interface


def run_pipeline(
    gm: fx.GraphModule,
    passes: Sequence[Pass],
    ctx: PassContext,
    instruments: Sequence[Instrument] = (),
    first_index: int = 1,
    held: frozenset[Property] = TRACED,
) -> tuple[list[PassRecord], frozenset[Property]]:
    """The record of every pass, and what holds after the last."""
    runner = Runner(ctx, instruments, held, first_index)
    return runner.run(gm, passes), runner.held


def run_passes(
    gm: fx.GraphModule, ctx: PassContext, scheme: str, *passes: Pass
) -> list[PassRecord]:
    """Assign one scheme to every matmul, logits included, then run passes through the runner."""
    paths = {module_path(n) for n in gm.graph.nodes if "linear" in n.name}
    schemes = AssignSchemes(schemes=(("*", scheme), *((path, scheme) for path in sorted(paths))))
    return run_pipeline(gm, [Canonicalize(), schemes, *passes], ctx)[0]


def tiny_context(interface: Interface, *batches: Tensor) -> PassContext:
    """A context whose calibration batches are these values of the only input."""
    name = interface.inputs[0]
    given = [{name: batch} for batch in batches]
    ctx = PassContext(interface, WeightStore())
    return replace(ctx, batches=given, probe=given[0] if given else None)


class OneLinear(nn.Module):
    """`fc`, from k inputs to n outputs."""

    def __init__(self, k: int, n: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(k, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class TwoLinears(nn.Module):
    """norm, if there is one ─► first ─► activation ─► second."""

    def __init__(
        self,
        k: int,
        inner: int,
        n: int,
        activation: Callable[[Tensor], Tensor] = functional.relu,
        norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(k) if norm else nn.Identity()
        self.first, self.second = nn.Linear(k, inner, bias), nn.Linear(inner, n, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(self.norm(x))))


class SideBySide(nn.Module):
    """`one` and `two` read the same value; their results follow each other in one tensor."""

    def __init__(self, k: int, n_one: int, n_two: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(k, n_one), nn.Linear(k, n_two)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x), self.two(x)), -1)


class Residual(nn.Module):
    """Two blocks and a head: x ─► x + a(x) ─► that + b(that) ─► head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x).relu()
        x = x + self.b(x).relu()
        return self.head(x)


def normal_weights(module: nn.Module) -> nn.Module:
    """The module with weights of mean 0 and variance 1 in the place of its own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


class TinyModel(nn.Module):
    """The least that most passes rewrite: embedding, one normed and gated MLP, head.

    ids `[batch, seq]` to logits `[batch, seq, 96]`.
    """

    def __init__(self, hidden: int = 64, inner: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, hidden)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.head = nn.Linear(hidden, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.mlp_norm(x)
        x = x + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm(x))


class LatentAttention(nn.Module):
    """What DeepSeek calls MLA: keys and values of two heads are expanded from one latent a token.

    query `[batch, 2, seq, 8 + 4]`, latent `[batch, total, 16]` and rotary key `[batch, total, 4]`
    to `[batch, 2, seq, 6]`.
    """

    heads, nope, rope, value, rank = 2, 8, 4, 6, 16

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.kv_b = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=bias)
        self.rope_proj = nn.Linear(self.rope, self.rope, bias=False)

    def parts(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without the rotary part, and values, of each head."""
        shape = (latent.shape[0], -1, self.heads, self.nope + self.value)
        made = self.kv_b(latent).view(shape).transpose(1, 2)
        return made.split([self.nope, self.value], dim=-1)

    def forward(self, query: Tensor, latent: Tensor, rope_key: Tensor) -> Tensor:
        keys, values = self.parts(latent.unsqueeze(1))
        broadcast = self.rope_proj(rope_key).unsqueeze(1).expand(-1, self.heads, -1, -1)
        key = torch.cat((keys, broadcast), dim=-1)
        return functional.scaled_dot_product_attention(query, key, values, scale=0.3)


def latent_inputs(seq: int, total: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences for a LatentAttention."""
    kind, generator = LatentAttention, torch.Generator().manual_seed(seed)
    shapes = (
        (2, kind.heads, seq, kind.nope + kind.rope),
        (2, total, kind.rank),
        (2, total, kind.rope),
    )
    query, latent, rope_key = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, latent, rope_key
