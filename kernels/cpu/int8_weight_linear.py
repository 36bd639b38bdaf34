"""W8A16 on a CPU: float activations times int8 weights, one scale per output channel.

Few tokens are multiplied in bfloat16, which holds every int8 code exactly, so that activations and
results are rounded to 8 bits (about 50 dB) and weights not at all; the scale is applied in float32.
Many are multiplied in bfloat16 or float32, whichever is faster on the machine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panguq.ir.ops.opset import define_op
from panguq.kernels.cpu.multiplying import multiplying_dtype

NAMESPACE = "panguq_cpu"
K_MULTIPLE = 16
ALIGNMENT_BYTES = 32
# What is converted and multiplied at a time: 2 MiB in bfloat16, memory that the allocator gives out
# again and again. A whole large weight would be mapped anew at every call, which costs more than
# converting it.
WEIGHTS_PER_PIECE = 1 << 20


def refusal(m: int | None, n: int, k: int) -> str | None:
    """Why no byte-reading kernel does this matmul; converting the weight takes every shape."""
    if k % K_MULTIPLE:
        return f"k={k} is not a multiple of {K_MULTIPLE}, the width of the kernel's loads"
    return None


def _scaled(result: Tensor, weight_scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    result = result.to(torch.float32).mul_(weight_scale.reshape(-1))  # it is nobody else's
    if bias is not None:
        result.add_(bias)
    return result.to(x.dtype).view(*x.shape[:-1], result.shape[-1])


def _converted(tokens: Tensor, weight: Tensor) -> Tensor:
    n, k = weight.shape
    rows = max(1, WEIGHTS_PER_PIECE // k)
    if n <= rows:
        return F.linear(tokens, weight.to(tokens.dtype))
    result = tokens.new_empty((tokens.shape[0], n))
    for start in range(0, n, rows):
        piece = slice(start, start + rows)
        result[:, piece] = F.linear(tokens, weight[piece].to(tokens.dtype))
    return result


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy: the kernel's loads are aligned, a file's weights may not be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor


def _fake_int8_weight_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@define_op(
    "int8_weight_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias,"
    " int few_tokens) -> Tensor",
    fake=_fake_int8_weight_linear,
    namespace=NAMESPACE,
)
def int8_weight_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, few_tokens: int
) -> Tensor:
    """x @ (weight * weight_scale).T + bias, the weight read as bytes or converted first.

    x float32 or bfloat16 [..., k]; weight int8 [n, k]; weight_scale float32 [n] or [n, 1]; bias
    float32 [n] or None. Returns [..., n] in x's dtype. Up to `few_tokens` tokens the kernel that
    reads bytes runs (k a multiple of 16); beyond, pieces of the weight are converted to bfloat16,
    or to float32 where that is multiplied faster.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.shape[0] > few_tokens:
        return _scaled(_converted(tokens.to(multiplying_dtype()), weight), weight_scale, bias, x)
    tokens = tokens.to(torch.bfloat16)
    # The kernel would round the scales to bfloat16; ones keep them out of it.
    ones = torch.ones(weight.shape[0], dtype=torch.bfloat16)
    result = torch._weight_int8pack_mm(aligned(tokens), aligned(weight), ones)
    return _scaled(result, weight_scale, bias, x)
