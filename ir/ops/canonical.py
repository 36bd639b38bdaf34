"""The ops that canonicalize raises tracing patterns into: one spelling per thing.

Each computes in float32 what the model's own modules compute (float64 stays float64), and
returns the dtype of its first argument; `rms_norm` with a wider weight returns the weight's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from panguq.ir.ops.opset import define_op


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rms_norm_fake(x: Tensor, weight: Tensor, rounds_once: bool) -> Tensor:
    dtype = x.dtype if rounds_once else torch.result_type(x, weight)
    return torch.empty_like(x, dtype=dtype)


@define_op(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset=0.0, bool rounds_once=False)"
    " -> Tensor",
    fake=_rms_norm_fake,
)
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds_once: bool = False
) -> Tensor:
    """`(weight + offset) * (x / sqrt(mean(x^2) + eps))` over the last axis; x `[..., k]`, weight
    `[k]`.

    The squares are summed in float64: then no order of the sum shows in the result, and compiled
    code gives the same bits. The normalized x is rounded to x's dtype before the product, as in
    Llama; with `rounds_once` the product is, as in Gemma, whose weights have an offset of 1.
    """
    wide = _wide(x)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True, dtype=torch.float64)
    normalized = wide * norm.square().div_(x.shape[-1]).add_(eps).rsqrt_().to(wide.dtype)
    if rounds_once:
        return normalized.mul_(_wide(weight) + offset).to(x.dtype)
    normalized = normalized.to(x.dtype)
    gain = weight + offset if offset else weight
    return normalized.mul_(gain) if weight.dtype == x.dtype else gain * normalized


@define_op(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, float offset) -> Tensor",
    fake=lambda x: x.new_empty(x.shape),
)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float) -> Tensor:
    """Layer norm with the gain `weight + offset`, which is rounded to the weight's dtype.

    x `[..., k]`, weight and bias `[k]`, all of one dtype. Without an offset it is
    `aten.layer_norm`.
    """
    return functional.layer_norm(x, weight.shape, weight + offset, bias, eps)


@define_op(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
    fake=lambda x: torch.empty_like(x),
)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding, `x * cos + turned(x) * sin`.

    x `[batch, heads, seq, d]`; cos and sin `[batch, seq, d]`. turned(x) is `concat(-x2, x1)` of
    the halves of the last axis; where `interleaved`, each pair (a, b) of neighbours is (-b, a).
    """
    cos, sin = (table.unsqueeze(1).to(x.dtype) for table in (cos, sin))
    half = x.shape[-1] // 2
    one, other = slice(None, half), slice(half, None)
    if interleaved:
        one, other = slice(0, None, 2), slice(1, None, 2)
    result = x * cos
    # Not addcmul, which rounds once where the model and compiled code round twice.
    result[..., one].sub_(x[..., other] * sin[..., one])
    result[..., other].add_(x[..., one] * sin[..., other])
    return result


@define_op(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    fake=lambda gate, up: torch.empty_like(gate),
)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise, both `[..., n]`."""
    return functional.silu(gate).mul_(up)


@define_op(
    "geglu(Tensor gate, Tensor up, str approximate) -> Tensor",
    fake=lambda gate: torch.empty_like(gate),
)
def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """`gelu(gate) * up`, elementwise, both `[..., n]`; approximate is "none" or "tanh"."""
    return functional.gelu(gate, approximate=approximate).mul_(up)


def _attention_fake(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, seq, _ = query.shape
    return query.new_empty((batch, seq, heads, value.shape[-1])).transpose(1, 2)


@define_op(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, "
    "Tensor? sinks=None, float softcap=0.0) -> Tensor",
    fake=_attention_fake,
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention with grouped heads.

    query `[batch, heads, seq, d]`; key and value `[batch, kv_heads, total, d]` with heads a
    multiple of kv_heads; mask broadcastable to `[batch, heads, seq, total]`, boolean (True
    attends) or additive. No mask hides nothing; a mask without elements stands for plain causal
    attention: query i attends to the keys 0 ... total - seq + i. `sinks` `[heads]` are scores of
    one more key, whose value is zero; a `softcap` c other than 0 makes every score s
    `c * tanh(s / c)` before the mask. The result is laid out as `[batch, seq, heads, d]`, as the
    next matmul reads it.
    """
    if sinks is None and softcap == 0.0:
        result = _attention(query, key, value, mask, scale)
    else:
        result = _attention_by_scores(query, key, value, mask, scale, sinks, softcap)
    return result.transpose(1, 2).contiguous().transpose(1, 2)


def _attention_by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    softcap: float,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    seq, total = query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = _wide(query) @ _wide(key).transpose(2, 3) * scale
    if softcap != 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + _added(mask, seq, total, scores)
    if sinks is not None:
        one_more = _wide(sinks)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, one_more), dim=-1)
    weights = scores.softmax(dim=-1)[..., :total]
    return (weights @ _wide(value)).to(query.dtype)


def _added(mask: Tensor, seq: int, total: int, scores: Tensor) -> Tensor:
    """The mask as what is added to scores: -inf where a key is hidden."""
    if mask.numel() == 0:
        mask = torch.ones(seq, total, dtype=torch.bool, device=scores.device).tril(total - seq)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    seq, total = query.shape[2], key.shape[2]
    causal = mask is not None and mask.numel() == 0
    if seq == 1 and (mask is None or causal or _is_same_for_heads(mask)):
        # One query of a group's heads each: as so many queries of one head, keys are read once.
        folded = query.reshape(query.shape[0], key.shape[1], groups, query.shape[3])
        hidden = None if causal else mask
        out = functional.scaled_dot_product_attention(folded, key, value, hidden, scale=scale)
        return out.reshape(*query.shape[:-1], value.shape[-1])
    if causal and seq != total:
        mask = torch.ones(seq, total, dtype=torch.bool, device=query.device)
        mask = mask.tril(diagonal=total - seq)
        causal = False
    if groups > 1 and torch.is_grad_enabled():  # with a gradient each head needs its own
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if causal else mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=key.shape[1] < query.shape[1],
    )


def _is_same_for_heads(mask: Tensor) -> bool:
    return mask.dim() < 3 or mask.shape[-3] == 1
