"""W8A8 on a CPU: int8 codes times int8 weights, summed exactly in int32, then scaled.

`torch._int_mm` reads the plain row-major weight, at every m, so that there is one copy of it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from panguq.ir.ops.opset import define_op

NAMESPACE = "panguq_cpu"
# |code - zero_point| <= 255 and |weight| <= 128, and the sum must fit int32.
LARGEST_K = (2**31 - 1) // (255 * 128)
# A float32 sum of this many products of int8 values is exact: 1024 * 128 * 128 == 2**24.
EXACT_FLOAT_K = 1024


def refusal(m: int | None, n: int, k: int) -> str | None:
    """Why `int8_linear` cannot do this matmul of m tokens (None: any), n outputs, k inputs."""
    if k < 2:
        return f"k={k}: torch._int_mm is wrong for a single input column"
    if k > LARGEST_K:
        return f"k={k} is more than {LARGEST_K}: a sum might not fit int32"
    return None


@functools.cache
def int_mm_is_exact() -> bool:
    """Whether torch._int_mm is exact here.

    On x86 without VNNI, oneDNN adds pairs of products in int16, which saturates.
    """
    codes = torch.full((16, 64), 127, dtype=torch.int8)
    weight = torch.tensor([[127], [-128]], dtype=torch.int8).repeat(8, 64)
    expected = codes.to(torch.int64) @ weight.to(torch.int64).t()
    return all(
        torch.equal(torch._int_mm(codes[:m], weight.t()).to(torch.int64), expected[:m])
        for m in (1, 16)
    )


def int32_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """sum_k codes * weight, exact: int8 [m, k] and int8 [n, k] -> int32 [m, n]."""
    if codes.shape[1] == 1:  # torch._int_mm is wrong for a single input column
        return codes.to(torch.int32) * weight.to(torch.int32).t()
    if int_mm_is_exact():
        return torch._int_mm(codes.contiguous(), weight.t())
    total = codes.new_zeros((codes.shape[0], weight.shape[0]), dtype=torch.int32)
    for part, weight_part in zip(
        codes.split(EXACT_FLOAT_K, dim=1), weight.split(EXACT_FLOAT_K, dim=1), strict=True
    ):
        total += (part.to(torch.float32) @ weight_part.to(torch.float32).t()).to(torch.int32)
    return total


def _fake_weight_row_sums(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[:-1], dtype=torch.int32)


@define_op(
    "weight_row_sums(Tensor weight) -> Tensor", fake=_fake_weight_row_sums, namespace=NAMESPACE
)
def weight_row_sums(weight: Tensor) -> Tensor:
    """sum_k weight: int8 [..., n, k] -> int32 [..., n]. Depends only on weights, so it can be
    folded."""
    return weight.sum(dim=-1, dtype=torch.int32)


def _fake_int8_linear(codes: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


@define_op(
    "int8_linear(Tensor codes, Tensor act_scale, Tensor? act_zero_point, Tensor weight,"
    " Tensor weight_scale, Tensor? row_sums, Tensor? bias, ScalarType dtype) -> Tensor",
    fake=_fake_int8_linear,
    namespace=NAMESPACE,
)
def int8_linear(
    codes: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(sum_k (codes - act_zero_point) * weight) * act_scale * weight_scale + bias.

    codes int8 [..., k]; act_scale float32 [1] or [..., 1]; act_zero_point int32 [1] or None;
    weight int8 [n, k]; weight_scale float32 [n] or [n, 1]; bias float32 [n] or None. Returns
    `dtype` [..., n]; the integer part is exact, the rest float32. `row_sums`, which only a zero
    point needs, is `weight_row_sums(weight)`; without it that is computed in every call.
    """
    total = int32_matmul(codes.reshape(-1, codes.shape[-1]), weight)
    if act_zero_point is not None:
        if row_sums is None:
            row_sums = weight_row_sums(weight)
        total.sub_(row_sums * act_zero_point)
    weight_scale = weight_scale.reshape(-1)
    # The conversion writes over its own input: a second [m, n] buffer costs more than it does.
    result = total.view(torch.float32).copy_(total)
    if act_scale.dim() == 1 and act_scale.numel() == 1:  # of all tokens; one token's has two axes
        result.mul_(weight_scale * act_scale)
    else:
        result.mul_(weight_scale).mul_(act_scale.reshape(-1, 1))
    if bias is not None:
        result.add_(bias)
    return result.to(dtype).view(*codes.shape[:-1], weight.shape[0])


def reference(
    codes: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What `int8_linear` documents: int64 sums, float64 scaling. `row_sums` is not used."""
    shifted = codes.to(torch.int64) - (0 if act_zero_point is None else act_zero_point)
    total = (shifted @ weight.to(torch.int64).t()).to(torch.float64)
    result = total * act_scale.to(torch.float64) * weight_scale.reshape(-1).to(torch.float64)
    return (result if bias is None else result + bias).to(dtype)
