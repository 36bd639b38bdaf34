"""Matmuls of experts on a CPU: for each expert that has rows, the kernel that a dense one calls.

Weights are stacked, `[experts, n, k]`, rows sorted by expert, and `counts` says how many each has:
see `ir/ops/experts.py`. Weights, scales and zero points of an expert without rows are not read.
With `members`, the weights are those of these experts alone, and the rows of others become zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from panguq.ir.ops.experts import each_experts_rows
from panguq.ir.ops.opset import define_op
from panguq.kernels.cpu.dequantized_linear import dequantize_and_multiply
from panguq.kernels.cpu.int4_linear import int4_kernel_scales, int4_kernel_weight, int4_linear
from panguq.kernels.cpu.int8_linear import int8_linear
from panguq.kernels.cpu.int8_weight_linear import int8_weight_linear
from panguq.tensors.row_slices import each_matrix

NAMESPACE = "panguq_cpu"


def _filled(
    result: Tensor, counts: Tensor, members: Sequence[int] | None
) -> Iterator[tuple[int, slice]]:
    """Every expert whose rows of the result are to be computed, by its place in the weight, and
    these rows; all others are made zero."""
    for place, rows in each_experts_rows(counts, members):
        if place is None:
            result[rows] = 0
        else:
            yield place, rows


def _at(stacked: Tensor | None, expert: int) -> Tensor | None:
    return None if stacked is None else stacked[expert]


def _fake_expert_int8_linear(codes: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[1]), dtype=dtype)


@define_op(
    "expert_int8_linear(Tensor codes, Tensor act_scale, Tensor? act_zero_point, Tensor weight,"
    " Tensor weight_scale, Tensor? row_sums, Tensor? bias, ScalarType dtype, Tensor counts,"
    " int[]? members=None) -> Tensor",
    fake=_fake_expert_int8_linear,
    namespace=NAMESPACE,
)
def expert_int8_linear(
    codes: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    row_sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    counts: Tensor,
    members: Sequence[int] | None = None,
) -> Tensor:
    """`int8_linear` of every expert that has rows; act_scale float32 [1] or [r, 1]."""
    result = codes.new_empty((codes.shape[0], weight.shape[1]), dtype=dtype)
    for expert, rows in _filled(result, counts, members):
        scale = act_scale if act_scale.numel() == 1 else act_scale[rows]
        stored = (weight[expert], weight_scale[expert], _at(row_sums, expert), _at(bias, expert))
        result[rows] = int8_linear(codes[rows], scale, act_zero_point, *stored, dtype)
    return result


def _fake_expert_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@define_op(
    "expert_int8_weight_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " int few_tokens, Tensor counts, int[]? members=None) -> Tensor",
    fake=_fake_expert_linear,
    namespace=NAMESPACE,
)
def expert_int8_weight_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    few_tokens: int,
    counts: Tensor,
    members: Sequence[int] | None = None,
) -> Tensor:
    """`int8_weight_linear` of every expert that has rows; `few_tokens` are one expert's."""
    result = x.new_empty((x.shape[0], weight.shape[1]))
    for expert, rows in _filled(result, counts, members):
        stored = (weight[expert], weight_scale[expert], _at(bias, expert))
        result[rows] = int8_weight_linear(x[rows], *stored, few_tokens)
    return result


@define_op(
    "expert_int4_kernel_weight(Tensor packed) -> Tensor",
    fake=lambda packed: packed.new_empty(packed.shape),
    namespace=NAMESPACE,
)
def expert_int4_kernel_weight(packed: Tensor) -> Tensor:
    """`int4_kernel_weight` of every expert: uint8 [experts, n, k / 2] both."""
    return each_matrix(int4_kernel_weight, packed.new_empty(packed.shape), packed)


def _fake_expert_int4_kernel_scales(scale: Tensor) -> Tensor:
    experts, n, groups = scale.shape
    return scale.new_empty((experts, groups, n, 2), dtype=torch.bfloat16)


@define_op(
    "expert_int4_kernel_scales(Tensor scale, Tensor? zero_point) -> Tensor",
    fake=_fake_expert_int4_kernel_scales,
    namespace=NAMESPACE,
)
def expert_int4_kernel_scales(scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """`int4_kernel_scales` of every expert: scale [experts, n, k / g] -> bfloat16
    [experts, k / g, n, 2]."""
    result = _fake_expert_int4_kernel_scales(scale)
    return each_matrix(int4_kernel_scales, result, scale, zero_point)


@define_op(
    "expert_int4_linear(Tensor x, Tensor kernel_weight, Tensor kernel_scales, Tensor packed,"
    " Tensor scale, Tensor? zero_point, int group_size, Tensor? bias, int few_tokens,"
    " Tensor counts, int[]? members=None) -> Tensor",
    fake=lambda x, kernel_weight: x.new_empty((x.shape[0], kernel_weight.shape[1])),
    namespace=NAMESPACE,
)
def expert_int4_linear(
    x: Tensor,
    kernel_weight: Tensor,
    kernel_scales: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    few_tokens: int,
    counts: Tensor,
    members: Sequence[int] | None = None,
) -> Tensor:
    """`int4_linear` of every expert that has rows; `few_tokens` are one expert's."""
    result = x.new_empty((x.shape[0], kernel_weight.shape[1]))
    for expert, rows in _filled(result, counts, members):
        result[rows] = int4_linear(
            x[rows],
            kernel_weight[expert],
            kernel_scales[expert],
            packed[expert],
            scale[expert],
            _at(zero_point, expert),
            group_size,
            _at(bias, expert),
            few_tokens,
        )
    return result


@define_op(
    "expert_dequantized_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero_point,"
    " int group_size, Tensor? bias, ScalarType compute_dtype, Tensor counts,"
    " int[]? members=None) -> Tensor",
    fake=lambda x, codes: x.new_empty((x.shape[0], codes.shape[1])),
    namespace=NAMESPACE,
)
def expert_dequantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
    counts: Tensor,
    members: Sequence[int] | None = None,
) -> Tensor:
    """`dequantized_linear` of every expert that has rows."""
    result = x.new_empty((x.shape[0], codes.shape[1]))
    for expert, rows in _filled(result, counts, members):
        stored = (codes[expert], scale[expert], _at(zero_point, expert), group_size)
        result[rows] = dequantize_and_multiply(x[rows], *stored, _at(bias, expert), compute_dtype)
    return result
