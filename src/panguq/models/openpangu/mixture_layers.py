"""Layers of openPangu's mixtures of experts, as modules of transformers' kind.

Their formulas are those of the models' published descriptions: vLLM's openpangu.py for Ultra MoE
and R-72B, vllm-ascend's Pro MoE, and arXiv 2505.21411 for its grouped experts.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

CosinesAndSines = tuple[Tensor, Tensor]


def rotary_embedding(config: Any, dim: int) -> nn.Module:
    """Cosines and sines of the first `dim` channels of a head, `[batch, seq, dim]` each."""
    own = copy.copy(config)
    own.head_dim = dim
    return LlamaRotaryEmbedding(own)


class OpenPanguMLP(nn.Module):
    """SwiGLU, `[..., hidden] -> [..., hidden]`."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return hidden


@use_experts_implementation
class OpenPanguExperts(nn.Module):
    """All routed experts of a layer: one SwiGLU each, their weights `[experts, n, k]`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[t, hidden]`, the others `[t, top_k]`; the weighted sum `[t, hidden]`."""
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            x = hidden_states[token]
            gate, up = functional.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
            x = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = x * top_k_weights[token, place, None]
            result.index_add_(0, token, weighted.to(result.dtype))
        return result


class GroupedMixture(nn.Module):
    """Pro MoE's experts in `num_experts_per_tok` groups: a token goes to the best one of each.

    Its weight is the softmax over all experts, times that expert's `router_scale`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.groups = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.router_scale = nn.Parameter(torch.ones(1, config.n_routed_experts))
        self.experts = OpenPanguExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_expert = OpenPanguMLP(config, width) if width else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = functional.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        size = scores.shape[-1] // self.groups
        best, index = scores.unflatten(-1, (self.groups, size)).max(dim=-1)
        index = index + torch.arange(0, self.groups * size, size, device=index.device)
        weights = (best * self.router_scale[0][index]).to(x.dtype)
        routed: Tensor = self.experts(x, index, weights)
        if self.shared_expert is not None:
            routed = routed + self.shared_expert(x)
        return routed.view(hidden_states.shape)


class OpenPanguRouter(nn.Linear):
    """One score an expert, computed in float32 whatever the weights' dtype is."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.float(), self.weight.float())


class ScoredMixture(nn.Module):
    """The experts of R-72B, Ultra MoE and 2.0: the best `num_experts_per_tok` by their sigmoid,
    which a bias moves for the choice alone; the weights of the chosen are made to add up to
    `routed_scaling_factor`."""

    def __init__(self, config: Any, shared_width: int) -> None:
        super().__init__()
        self.top_k, self.normed = config.num_experts_per_tok, config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.gate = OpenPanguRouter(config.hidden_size, config.n_routed_experts, bias=False)
        biased = config.router_enable_expert_bias
        zeros = nn.Parameter(torch.zeros(config.n_routed_experts)) if biased else None
        self.register_parameter("e_score_correction_bias", zeros)
        self.experts = OpenPanguExperts(config)
        self.shared_experts = OpenPanguMLP(config, shared_width) if shared_width else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = self.gate(x).sigmoid()
        bias = self.e_score_correction_bias
        _, index = (scores if bias is None else scores + bias.float()).topk(self.top_k, dim=-1)
        weights = scores.gather(-1, index)
        if self.normed:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        routed: Tensor = self.experts(x, index, (weights * self.scaling).to(x.dtype))
        if self.shared_experts is not None:
            routed = routed + self.shared_experts(x)
        return routed.view(hidden_states.shape)


class GroupedAttention(nn.Module):
    """Pro MoE's attention: grouped heads, biases on all four projections."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // heads
        self.num_key_value_groups = heads // kv_heads
        bias, hidden = config.attention_bias, config.hidden_size
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=bias)

    def forward(self, x: Tensor, rotary: CosinesAndSines, mask: Tensor, cache: Any) -> Tensor:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (_heads(one, self.head_dim) for one in projected)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return _attend(self, query, key, value, mask, self.head_dim**-0.5)


class SinkAttention(nn.Module):
    """R-72B's attention: one projection, normed keys, rotary positions on the first channels of a
    head, values of another size, and learned keys and values before all tokens'."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = heads // kv_heads
        self.rotary_dim = config.qk_rope_dim
        self.head_dim = config.qk_rope_dim + config.qk_nope_dim
        self.value_dim = config.v_channels
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.value_dim]
        bias, sinks = config.attention_bias, config.param_sink_number
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=bias)
        self.o_proj = nn.Linear(heads * self.value_dim, config.hidden_size, bias=bias)
        self.k_layernorm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.param_sink_key = nn.Parameter(torch.zeros(sinks, kv_heads, self.head_dim))
        self.param_sink_value = nn.Parameter(torch.zeros(sinks, kv_heads, self.value_dim))

    def forward(self, x: Tensor, rotary: CosinesAndSines, mask: Tensor, cache: Any) -> Tensor:
        projected = self.qkv_proj(x).split(self.sizes, dim=-1)
        sizes = (self.head_dim, self.head_dim, self.value_dim)
        query, key, value = map(_heads, projected, sizes)
        key = self.k_layernorm(key)
        dim = self.rotary_dim
        turned = apply_rotary_pos_emb(query[..., :dim], key[..., :dim], *rotary)
        query = torch.cat([turned[0], query[..., dim:]], dim=-1)
        key = torch.cat([turned[1], key[..., dim:]], dim=-1)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        key = torch.cat([_each_row(self.k_layernorm(self.param_sink_key), x), key], dim=2)
        value = torch.cat([_each_row(self.param_sink_value, x), value], dim=2)
        return _attend(self, query, key, value, mask, self.head_dim**-0.5)


class SinkLatentAttention(nn.Module):
    """Multi-head latent attention: the cache holds a normed latent and one rotary key a token.

    Learned sinks are latents and rotary keys as well, before all tokens'.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        self.num_key_value_groups = 1
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim, self.rank, self.head_dim = config.v_head_dim, rank, self.nope + self.rope
        self.interleaved, bias = config.rope_interleaved, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = LlamaRMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + self.rope, bias=bias)
        self.kv_a_layernorm = LlamaRMSNorm(rank, eps=config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(rank, heads * (self.nope + self.value_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.value_dim, hidden, bias=bias)
        self.sinks = config.param_sink_number
        if self.sinks:
            self.param_sink_k_pe = nn.Parameter(torch.zeros(self.sinks, self.rope))
            self.param_sink_compressed_kv = nn.Parameter(torch.zeros(self.sinks, rank))

    def forward(self, x: Tensor, rotary: CosinesAndSines, mask: Tensor, cache: Any) -> Tensor:
        if self.config.q_lora_rank is None:
            query = self.q_proj(x)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = _heads(query, self.head_dim).split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        latent, k_rope = self.kv_a_layernorm(latent)[:, None], k_rope[:, None]  # one head
        if self.interleaved:
            q_rope, k_rope = _halves(q_rope), _halves(k_rope)
        q_rope, k_rope = apply_rotary_pos_emb(q_rope, k_rope, *rotary)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer_idx)
        if self.sinks:
            own = self.kv_a_layernorm(self.param_sink_compressed_kv)
            latent = torch.cat([_each_row(own[:, None], x), latent], dim=2)
            k_rope = torch.cat([_each_row(self.param_sink_k_pe[:, None], x), k_rope], dim=2)
        expanded = _heads(self.kv_b_proj(latent[:, 0]), self.nope + self.value_dim)
        k_nope, value = expanded.split([self.nope, self.value_dim], dim=-1)
        key = torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)], dim=-1)
        query = torch.cat([q_nope, q_rope], dim=-1)
        return _attend(self, query, key, value, mask, self.head_dim**-0.5)


def _heads(x: Tensor, dim: int) -> Tensor:
    """`[batch, seq, heads * dim]` as `[batch, heads, seq, dim]`."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def _halves(x: Tensor) -> Tensor:
    """Channels in pairs (x0, x1), (x2, x3), … as (x0, x2, …, x1, x3, …), whose halves turn."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def _each_row(sinks: Tensor, x: Tensor) -> Tensor:
    """`[sinks, heads, dim]` as `[batch, heads, sinks, dim]`."""
    return sinks.transpose(0, 1)[None].expand(x.shape[0], -1, -1, -1)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention through transformers' interface, and the output projection."""
    kind, sinks = module.config._attn_implementation, module.config.param_sink_number
    keys = key.shape[2] - sinks
    if mask.shape[-1] - sinks != keys:  # a cache that forgets what its window hides
        mask = torch.cat([mask[..., :sinks], mask[..., -keys:]], dim=-1)
    if kind == "eager":  # which adds its mask
        hidden = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
        mask = hidden.masked_fill(mask.logical_not(), torch.finfo(query.dtype).min)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
    mixed, _ = function(module, query, key, value, mask, dropout=0.0, scaling=scale)
    result: Tensor = module.o_proj(mixed.flatten(2))
    return result
