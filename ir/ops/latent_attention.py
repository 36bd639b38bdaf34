"""Attention whose keys and values are expanded from one latent a token (MLA), in either form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from panguq.ir.ops import canonical
from panguq.ir.ops.opset import define_op


def absorbs(query_nope: Tensor, query_rope: Tensor, latent: Tensor, weight: Tensor) -> bool:
    """Whether the absorbed form multiplies less than the expanded one, for these shapes.

    With s queries, t keys, h heads, rank r and sizes n (nope), p (rope) and v (value) of a head,
    each sequence takes
        expanded  t h (n + v) r + s t h (n + p + v)    multiplications,
        absorbed  s h (n + v) r + s t h (2 r + p).
    So a decoding step behind a cache absorbs, and a prompt without one, t = s, expands.
    """
    _, heads, seq, nope = query_nope.shape
    total, rank = latent.shape[2:]
    rope, value = query_rope.shape[3], weight.shape[0] // heads - nope
    expanded = total * (nope + value) * rank + seq * total * (nope + rope + value)
    absorbed = seq * (nope + value) * rank + seq * total * (2 * rank + rope)
    return bool(absorbed < expanded)


def of_heads(weight: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """What makes keys and values of latents: views `[heads, nope, rank]` and `[heads, v, rank]`."""
    apart = weight.unflatten(0, (heads, -1))
    return apart[:, :nope], apart[:, nope:]


def expanded_keys(latent: Tensor, weight: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """Every head's keys without the rotary part and values, `[batch, heads, total, nope or v]`."""
    made = functional.linear(latent.squeeze(1), weight).unflatten(-1, (heads, -1)).transpose(1, 2)
    return made[..., :nope], made[..., nope:]


def _fake(query_nope: Tensor, weight: Tensor) -> Tensor:
    batch, heads, seq, nope = query_nope.shape
    value = weight.shape[0] // heads - nope
    return query_nope.new_empty((batch, seq, heads, value)).transpose(1, 2)


@define_op(
    "latent_attention(Tensor query_nope, Tensor query_rope, Tensor latent, Tensor rope_key,"
    " Tensor weight, Tensor? mask, float scale) -> Tensor",
    fake=_fake,
)
def latent_attention(
    query_nope: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), `[batch, heads, seq, v]`.

    query_nope `[batch, heads, seq, nope]`, query_rope `[batch, heads, seq, rope]`; latent
    `[batch, 1, total, rank]` and rope_key `[batch, 1, total, rope]`, of all tokens; weight
    `[heads * (nope + v), rank]`, whose rows are, head after head, W_uk `[nope, rank]` and W_uv
    `[v, rank]`. mask, scale and the layout of the result are those of `attention`. The scores of a
    head are `query_nope (W_uk c) + query_rope k` for a token's latent c and rotary key k, and its
    values `W_uv c`. Both forms read that one weight:

    expanded  keys and values are made of all latents, then ordinary attention;
    absorbed  `(query_nope W_uk) c`: the query is brought to the latents, which all heads share as
              keys and values, and W_uv is applied to the result.

    They differ by rounding alone; `absorbs` chooses.
    """
    heads, nope = query_nope.shape[1], query_nope.shape[3]
    if absorbs(query_nope, query_rope, latent, weight):
        to_keys, to_values = of_heads(weight, heads, nope)
        query = torch.cat((query_nope @ to_keys, query_rope), dim=-1)
        key = torch.cat((latent, rope_key), dim=-1)
        mixed = _with_one_key_head(query, key, latent, mask, scale)
        result = mixed @ to_values.transpose(1, 2)
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    keys, values = expanded_keys(latent, weight, heads, nope)
    key = torch.cat((keys, rope_key.expand(-1, heads, -1, -1)), dim=-1)
    query = torch.cat((query_nope, query_rope), dim=-1)
    return canonical.attention(query, key, values, mask, scale)


def _with_one_key_head(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """`attention` where all heads read one key: they become rows, so that it need not be copied."""
    batch, heads, seq, _ = query.shape
    total = key.shape[2]
    if mask is not None and mask.numel() == 0:
        mask = None if seq == 1 else torch.ones(seq, total, dtype=torch.bool).tril(total - seq)
        mask = None if mask is None else mask.to(query.device)
    if mask is not None:
        mask = mask.expand(batch, heads, seq, total).reshape(batch, 1, heads * seq, total)
    rows = query.reshape(batch, 1, heads * seq, -1)
    out = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.view(batch, heads, seq, -1)
