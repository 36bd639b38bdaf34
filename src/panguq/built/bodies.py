"""How ops are written for torch's compiler: each as a plain expression that it can fuse.

Every body computes what its op documents, in the same precision; sums may come in another order.
Where an op runs another kernel for few tokens than for many, the body is for one of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from panguq.built.int8_sums import int8_sums
from panguq.ir.ops import canonical, quantize
from panguq.ir.ops.opset import Body, body_of
from panguq.kernels.cpu import (
    bfloat16_float,
    dequantized_linear,
    int4_linear,
    int8_linear,
    int8_weight_linear,
)
from panguq.kernels.cpu.int8_linear import EXACT_FLOAT_K
from panguq.kernels.cpu.multiplying import multiplying_dtype

# Their own bodies fuse as they are.
_AS_THEY_ARE = (
    canonical.rms_norm, canonical.layer_norm, canonical.swiglu, canonical.geglu,
    quantize.quantize_per_token, quantize.quantize_per_tensor, quantize.quantize_per_channel,
    quantize.dequantize, bfloat16_float.bfloat16_linear,
)  # fmt: skip


def bodies(few: bool, own_sums: bool = False) -> Mapping[Any, Body]:
    """The body of every op of panguq that may be compiled, for few or for many tokens; with
    `own_sums` the library of `int8_sums` does the integer matmuls of few."""
    own: dict[Any, Body] = {op: body_of(op) for op in _AS_THEY_ARE}
    own[canonical.rotary] = _rotary
    of_few = _own_sums if own_sums else _fused_sums
    own[int8_linear.int8_linear] = _int8(of_few if few else _matmul_sums)
    own[int8_weight_linear.int8_weight_linear] = _int8_weight_of_few if few else _int8_weight
    own[int4_linear.int4_linear] = _int4_of_few if few else _int4_of_many
    own[dequantized_linear.dequantized_linear] = _dequantized
    return MappingProxyType(own)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    cos, sin = (table.unsqueeze(1).to(x.dtype) for table in (cos, sin))
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def _int8(sums: Callable[[Tensor, Tensor], Tensor]) -> Body:
    """The op's body by its exact sums: of codes `[m, k]` and weights `[n, k]`, int32 `[m, n]`."""

    def body(
        codes: Tensor,
        act_scale: Tensor,
        act_zero_point: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor,
        row_sums: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        total = sums(codes.reshape(-1, codes.shape[-1]), weight)
        if act_zero_point is not None:
            rows = weight.sum(dim=-1, dtype=torch.int32) if row_sums is None else row_sums
            total = total - rows * act_zero_point
        weight_scale = weight_scale.reshape(-1)
        if act_scale.numel() == 1 and act_scale.dim() == 1:
            result = total.to(torch.float32) * (weight_scale * act_scale)
        else:
            result = total.to(torch.float32) * weight_scale * act_scale.reshape(-1, 1)
        if bias is not None:
            result = result + bias
        return result.to(dtype).reshape(*codes.shape[:-1], weight.shape[0])

    return body


def _fused_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """For few tokens, since `torch._int_mm` is wrong for one token in compiled code on some
    machines. Each float32 sum is of so few products that it is exact."""
    parts = zip(codes.split(EXACT_FLOAT_K, dim=1), weight.split(EXACT_FLOAT_K, dim=1), strict=True)
    first, *others = [
        (part.to(torch.float32).unsqueeze(1) * own.to(torch.float32)).sum(-1).to(torch.int32)
        for part, own in parts
    ]
    for more in others:
        first = first + more
    return first


def _own_sums(codes: Tensor, weight: Tensor) -> Tensor:
    return int8_sums(codes.contiguous(), weight)


def _matmul_sums(codes: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(codes, weight.t())


def _int8_weight(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, few_tokens: int
) -> Tensor:
    dtype = multiplying_dtype()
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    return _scaled(F.linear(tokens, weight.to(dtype)), weight_scale, bias, x)


def _int8_weight_of_few(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, few_tokens: int
) -> Tensor:
    if few_tokens == 0:
        return _int8_weight(x, weight, weight_scale, bias, few_tokens)
    tokens = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).to(torch.float32)
    result = (tokens.unsqueeze(1) * weight.to(torch.float32)).sum(-1).to(torch.bfloat16)
    return _scaled(result, weight_scale, bias, x)


def _scaled(result: Tensor, weight_scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    result = result.to(torch.float32) * weight_scale.reshape(-1)
    if bias is not None:
        result = result + bias
    return result.to(x.dtype).reshape(*x.shape[:-1], result.shape[-1])


def _int4_of_few(
    x: Tensor,
    kernel_weight: Tensor,
    kernel_scales: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    few_tokens: int,
) -> Tensor:
    if few_tokens == 0:
        return _dequantized(x, packed, scale, zero_point, group_size, bias, torch.bfloat16)
    tokens = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    result = torch.ops.aten._weight_int4pack_mm_for_cpu(
        tokens, kernel_weight, group_size, kernel_scales
    ).to(torch.float32)
    if bias is not None:
        result = result + bias
    return result.to(x.dtype).reshape(*x.shape[:-1], result.shape[-1])


def _int4_of_many(
    x: Tensor,
    kernel_weight: Tensor,
    kernel_scales: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    few_tokens: int,
) -> Tensor:
    return _dequantized(x, packed, scale, zero_point, group_size, bias, torch.bfloat16)


def _dequantized(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
) -> Tensor:
    """`compute_dtype` is the least that is rounded to, as in the op.

    Packed columns are multiplied as they lie, all even ones before all odd ones, and the input's
    are brought into that order: the compiler does not vectorize what interleaves them."""
    compute_dtype = multiplying_dtype(compute_dtype)
    tokens = x.reshape(-1, x.shape[-1]).to(compute_dtype)
    if codes.dtype == torch.uint8:
        tokens = torch.cat((tokens[:, 0::2], tokens[:, 1::2]), dim=1)
        low = ((codes & 15) ^ 8).to(torch.float32) - 8
        high = ((codes >> 4) ^ 8).to(torch.float32) - 8
        halves = [_dequantize(half, scale, zero_point, group_size // 2) for half in (low, high)]
        weight = torch.cat(halves, dim=1)
    else:
        weight = _dequantize(codes.to(torch.float32), scale, zero_point, group_size)
    result = F.linear(tokens, weight.to(compute_dtype)).to(x.dtype)
    if bias is not None:
        result = result + bias
    return result.reshape(*x.shape[:-1], codes.shape[0])


def _dequantize(
    values: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int
) -> Tensor:
    groups = values.unflatten(1, (-1, group_size))
    if zero_point is not None:
        groups = groups - zero_point.unsqueeze(-1)
    return (groups * scale.to(torch.float32).unsqueeze(-1)).flatten(1)
