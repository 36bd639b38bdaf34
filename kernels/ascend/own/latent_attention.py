"""Latent attention on an NPU: the vendor's fused attention in the form that multiplies less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from panguq.ir.ops.latent_attention import absorbs, expanded_keys, of_heads
from panguq.ir.ops.opset import define_op
from panguq.kernels.ascend.own.triton.launch import NAMESPACE
from panguq.kernels.ascend.vendor.attention import (
    ALIGNMENT_BYTES,
    LATENT_HEAD_SIZE,
    LATENT_HEADS,
    ROPE_HEAD_SIZES,
    ROPE_SIZE,
    npu_fused_infer_attention_score,
)
from panguq.kernels.ascend.vendor.contracts import violations


@dataclass(frozen=True)
class FusedSizes:
    """What the fused attention gets in one form: a head's size, how many query heads, and whether
    the rotary parts are given apart or joined to the rest."""

    head: int
    heads: int
    apart: bool


def absorbed_sizes(heads: int, rank: int, rope: int) -> FusedSizes:
    """Latents of 512 and a rotary part of 64 are given apart, the heads filled up with zeros to a
    number that the op takes. Others are joined, so that key and value are one tensor, whose rotary
    end in the result nobody reads."""
    if (rank, rope) == (LATENT_HEAD_SIZE, ROPE_SIZE):
        return FusedSizes(rank, min((n for n in LATENT_HEADS if n >= heads), default=heads), True)
    return FusedSizes(_aligned(rank + rope), heads, False)


def expanded_sizes(heads: int, nope: int, rope: int, value: int) -> FusedSizes:
    """Heads of 128 beside a rotary part of 64 are given apart. Others are joined, and all filled up
    with zeros to one size, since the op's values are as wide as its keys."""
    if nope == value and nope in ROPE_HEAD_SIZES[1:] and rope == ROPE_SIZE:
        return FusedSizes(nope, heads, True)
    return FusedSizes(_aligned(max(nope + rope, value)), heads, False)


def _aligned(size: int) -> int:
    """What the op aligns 16-bit heads to."""
    step = ALIGNMENT_BYTES // 2
    return -(-size // step) * step


def _fused(
    sizes: FusedSizes,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    value: Tensor | None,
    hidden: Tensor | None,
    scale: float,
) -> Tensor:
    """The fused attention of `(other part, rotary part)` of queries and keys; without a value the
    keys are it. `[batch, heads, seq, head]`, or more of both."""
    if sizes.apart:
        more = (0, 0, 0, 0, 0, sizes.heads - queries[0].shape[1])
        query, query_rope = (functional.pad(x, more) for x in queries)
        key, key_rope = keys
        ropes = (query_rope.contiguous(), key_rope.contiguous())
    else:
        query, key = (_filled(torch.cat(parts, dim=-1), sizes.head) for parts in (queries, keys))
        ropes = None
    value = key if value is None else _filled(value, sizes.head)
    tensors = tuple(x.contiguous() for x in (query, key, value))
    named = _named(sizes, int(key.shape[1]), hidden, scale, ropes)
    result: Tensor = npu_fused_infer_attention_score(*tensors, **named)[0]
    return result


def _filled(x: Tensor, size: int) -> Tensor:
    return functional.pad(x, (0, size - x.shape[3]))


def _named(
    sizes: FusedSizes,
    key_heads: int,
    hidden: Tensor | None,
    scale: float,
    ropes: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    named: dict[str, Any] = {
        "atten_mask": hidden,
        "num_heads": sizes.heads,
        "scale": scale,
        "input_layout": "BNSD",
        "num_key_value_heads": key_heads,
    }
    return named if ropes is None else {**named, "query_rope": ropes[0], "key_rope": ropes[1]}


def refusal_of_forms(
    query_nope: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    weight: Tensor,
    hidden: Tensor | None,
    scale: float,
) -> str | None:
    """Why the fused attention's contract takes one of the forms not; None if it takes both.

    Tensors may be fake and sizes symbolic; none is computed with, which would add guards.
    """
    batch, heads, seq, nope = query_nope.shape
    total, rank = latent.shape[2:]
    rope, value = query_rope.shape[3], weight.shape[0] // heads - nope
    forms = {
        "absorbed": (absorbed_sizes(heads, rank, rope), 1),
        "expanded": (expanded_sizes(heads, nope, rope, value), heads),
    }
    broken: dict[str, None] = {}
    for form, (sizes, key_heads) in forms.items():
        query = query_nope.new_empty((batch, sizes.heads, seq, sizes.head))
        key = latent.new_empty((batch, key_heads, total, sizes.head))
        ropes = None
        if sizes.apart:
            of_query, of_key = (x.new_empty((*x.shape[:3], rope)) for x in (query, key))
            ropes = (of_query, of_key)
        named = _named(sizes, key_heads, hidden, scale, ropes)
        found = violations(npu_fused_infer_attention_score, (query, key, key), named)
        broken |= {f"{form}: {violation}": None for violation in found}
    return "; ".join(broken) or None


def _fake(query_nope: Tensor, weight: Tensor) -> Tensor:
    batch, heads, seq, nope = query_nope.shape
    return query_nope.new_empty((batch, heads, seq, weight.shape[0] // heads - nope))


@define_op(
    "latent_attention(Tensor query_nope, Tensor query_rope, Tensor latent, Tensor rope_key,"
    " Tensor weight, Tensor? hidden, float scale) -> Tensor",
    fake=_fake,
    namespace=NAMESPACE,
)
def latent_attention(
    query_nope: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    weight: Tensor,
    hidden: Tensor | None,
    scale: float,
) -> Tensor:
    """What `panguq.latent_attention` computes of the same operands, by
    `npu_fused_infer_attention_score` in either form.

    hidden: bool `[batch or 1, 1, seq, total]`, True where a key is hidden; None hides nothing.
    Returns `[batch, heads, seq, v]`, contiguous.
    """
    _, heads, _, nope = query_nope.shape
    rank, rope, value = latent.shape[3], query_rope.shape[3], weight.shape[0] // heads - nope
    to_keys, to_values = of_heads(weight, heads, nope)
    if absorbs(query_nope, query_rope, latent, weight):
        sizes = absorbed_sizes(heads, rank, rope)
        queries = (query_nope @ to_keys, query_rope)
        mixed = _fused(sizes, queries, (latent, rope_key), None, hidden, scale)
        return mixed[:, :heads, :, :rank] @ to_values.transpose(1, 2)
    sizes = expanded_sizes(heads, nope, rope, value)
    keys, values = expanded_keys(latent, weight, heads, nope)
    rope_key = rope_key.expand(-1, heads, -1, -1)
    result = _fused(sizes, (query_nope, query_rope), (keys, rope_key), values, hidden, scale)
    return result[..., :value].contiguous()
