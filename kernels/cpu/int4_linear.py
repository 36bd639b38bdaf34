"""W4A16 on a CPU: float activations times 4-bit weights, one scale per group of inputs.

PyTorch's kernel for few tokens has a weight layout of its own, which depends on the machine's
vector width: run the packing ops when a model is loaded, never save what they return. For many
tokens, dequantizing the stored weight first is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.ir.ops.opset import define_op
from panguq.ir.ops.packing import unpack_int4
from panguq.kernels.cpu.dequantized_linear import dequantize_and_multiply
from panguq.tensors.row_slices import row_slices

NAMESPACE = "panguq_cpu"
N_MULTIPLE = 16
ROWS_PER_BLOCK = 64  # the kernel lays out blocks of so many rows, or fewer, one after the other
GROUP_SIZES = (32, 64, 128, 256)


def refusal(m: int | None, n: int, k: int, group_size: int) -> str | None:
    """Why `int4_linear` cannot do this matmul."""
    if group_size not in GROUP_SIZES:
        return f"group size {group_size} is none of {GROUP_SIZES}"
    if k % group_size:
        return f"k={k} is not a multiple of the group size {group_size}"
    if n % N_MULTIPLE:
        return f"n={n} is not a multiple of {N_MULTIPLE}"
    return None


def _fake_int4_kernel_weight(packed: Tensor) -> Tensor:
    return packed.new_empty(packed.shape)


@define_op(
    "int4_kernel_weight(Tensor packed) -> Tensor",
    fake=_fake_int4_kernel_weight,
    namespace=NAMESPACE,
)
def int4_kernel_weight(packed: Tensor) -> Tensor:
    """Canonical int4 weight -> the kernel's layout: uint8 [n, k / 2] both, the same nibbles + 8."""
    packed = packed.contiguous()
    arranged = torch.empty_like(packed)
    for rows in row_slices(packed, ROWS_PER_BLOCK):
        codes = unpack_int4(packed[rows]).to(torch.int32).add_(8)
        arranged[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return arranged


def _fake_int4_kernel_scales(scale: Tensor) -> Tensor:
    return scale.new_empty((scale.shape[1], scale.shape[0], 2), dtype=torch.bfloat16)


@define_op(
    "int4_kernel_scales(Tensor scale, Tensor? zero_point) -> Tensor",
    fake=_fake_int4_kernel_scales,
    namespace=NAMESPACE,
)
def int4_kernel_scales(scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """scale float [n, k / g], zero_point integer, same shape, or None -> bfloat16 [k / g, n, 2].

    The kernel computes code * scale + offset, offset = -zero_point * scale, both rounded to
    bfloat16: without a zero point the offset is an exact 0, with one it costs 1 to 2 dB of 50.
    A quantizer that rounds its scales to bfloat16 before it computes codes gains as much.
    """
    rounded = scale.to(torch.bfloat16)
    if zero_point is None:
        offset = torch.zeros_like(rounded)
    else:
        offset = (-zero_point.to(torch.float32) * rounded.to(torch.float32)).to(torch.bfloat16)
    return torch.stack((rounded.t(), offset.t()), dim=-1).contiguous()


def _fake_int4_linear(x: Tensor, kernel_weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], kernel_weight.shape[0]))


@define_op(
    "int4_linear(Tensor x, Tensor kernel_weight, Tensor kernel_scales, Tensor packed,"
    " Tensor scale, Tensor? zero_point, int group_size, Tensor? bias, int few_tokens) -> Tensor",
    fake=_fake_int4_linear,
    namespace=NAMESPACE,
)
def int4_linear(
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
    """x @ ((codes - zero_point) * scale).T + bias, in PyTorch's int4 kernel or dequantized first.

    x float32 or bfloat16 [..., k]; packed, scale, zero_point: the stored weight, and the two kernel
    tensors that the ops above make of it; group_size 32, 64, 128 or 256; bias float32 [n] or None.
    Returns [..., n] in x's dtype. Up to `few_tokens` tokens the kernel runs, and the stored weight
    is not read, so that it may stay in its file; x, the scales and the result are rounded to
    bfloat16. Beyond, `dequantized_linear` reads the stored weight; x, the dequantized weight and
    the result are rounded, unless float32 is multiplied faster. All sums are float32.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.shape[0] > few_tokens:
        stored = (packed, scale, zero_point, group_size)
        return dequantize_and_multiply(x, *stored, bias, torch.bfloat16)
    result = torch.ops.aten._weight_int4pack_mm_for_cpu(
        tokens.to(torch.bfloat16).contiguous(),
        kernel_weight.contiguous(),
        group_size,
        kernel_scales.contiguous(),
    ).to(torch.float32)
    if bias is not None:
        result.add_(bias)
    return result.to(x.dtype).view(*x.shape[:-1], result.shape[-1])
