"""What a float32 model multiplies in bfloat16 on processors where that is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panguq.ir.ops.canonical import attention
from panguq.ir.ops.opset import body_of, define_op

NAMESPACE = "panguq_cpu"
FEW_QUERIES = 16
"""Up to here converting the keys of the past costs more than multiplying them in bfloat16 saves."""


def _fake_bfloat16_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@define_op(
    "bfloat16_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_fake_bfloat16_linear,
    namespace=NAMESPACE,
)
def bfloat16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, x and the product rounded to bfloat16, sums in float32.

    x float [..., k]; weight bfloat16 [n, k]; bias float [n] or None, added in x's dtype. Returns
    [..., n] in x's dtype.
    """
    result = F.linear(x.to(torch.bfloat16), weight).to(x.dtype)
    return result if bias is None else result + bias.to(x.dtype)


def _fake_bfloat16_attention(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, seq, _ = query.shape
    return query.new_empty((batch, seq, heads, value.shape[-1])).transpose(1, 2)


@define_op(
    "bfloat16_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale)"
    " -> Tensor",
    fake=_fake_bfloat16_attention,
    namespace=NAMESPACE,
)
def bfloat16_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """`panguq.attention` without sinks and softcap, in bfloat16 for more than `FEW_QUERIES`.

    query, key and value are rounded then, and an additive mask; the softmax and all sums are
    float32. Returns query's dtype, laid out as `panguq.attention` does.
    """
    if query.shape[2] <= FEW_QUERIES:
        return body_of(attention)(query, key, value, mask, scale)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(torch.bfloat16)
    rounded = [tensor.to(torch.bfloat16) for tensor in (query, key, value)]
    result: Tensor = body_of(attention)(*rounded, mask, scale)
    return result.to(query.dtype)
