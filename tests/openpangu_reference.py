"""openPangu's dense model in a few lines of torch, from its published description alone.

Root mean square norm, attention with biases on q, k, v and o and fewer key than query heads, rotary
positions over the halves of a head, a gated SiLU MLP without biases, residuals around both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def logits(weights: Weights, config: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Logits `[seq, vocab]` for token ids `[seq]`."""
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        own = _under(weights, f"model.layers.{layer}.")
        normed = _norm(x, own["input_layernorm.weight"], config)
        x = x + _attention(normed, _under(own, "self_attn."), config)
        normed = _norm(x, own["post_attention_layernorm.weight"], config)
        x = x + _mlp(normed, _under(own, "mlp."))
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return _norm(x, weights["model.norm.weight"], config) @ weights[f"{head}.weight"].T


def _norm(x: Tensor, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight


def _mlp(x: Tensor, own: Weights) -> Tensor:
    gate = x @ own["gate_proj.weight"].T
    return (gate * torch.sigmoid(gate) * (x @ own["up_proj.weight"].T)) @ own["down_proj.weight"].T


def _attention(x: Tensor, own: Weights, config: Mapping[str, Any]) -> Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    q, k, v = (x @ own[f"{n}_proj.weight"].T + own[f"{n}_proj.bias"] for n in "qkv")
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        q_head = _rotate(q[:, head * size : (head + 1) * size], config["rope_theta"])
        k_head = _rotate(k[:, group * size : (group + 1) * size], config["rope_theta"])
        scores = q_head @ k_head.T / math.sqrt(size)
        later = torch.ones_like(scores).triu(1).bool()
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        outputs.append(weights @ v[:, group * size : (group + 1) * size])
    return torch.cat(outputs, dim=1) @ own["o_proj.weight"].T + own["o_proj.bias"]


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Turn each pair (i, i + half) by position times theta^(-i / half)."""
    half = x.shape[1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[:, :half], x[:, half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)


def _under(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
