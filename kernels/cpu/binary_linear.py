"""A matmul of a binarized weight on a CPU: dequantize it piece by piece, then multiply in float."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from panguq.ir.ops.binary import dequantize_binary
from panguq.ir.ops.opset import define_op

NAMESPACE = "panguq_cpu"
WEIGHTS_PER_PIECE = 1 << 18  # what is dequantized and multiplied at a time: 1 MiB in float32


def _fake_binary_linear(x: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@define_op(
    "binary_linear(Tensor x, Tensor codes, Tensor magnitudes, Tensor salient, int block_size,"
    " Tensor? bias, ScalarType compute_dtype) -> Tensor",
    fake=_fake_binary_linear,
    namespace=NAMESPACE,
)
def binary_linear(
    x: Tensor,
    codes: Tensor,
    magnitudes: Tensor,
    salient: Tensor,
    block_size: int,
    bias: Tensor | None,
    compute_dtype: torch.dtype,
) -> Tensor:
    """x @ dequantize_binary(codes, magnitudes, salient).T + bias, multiplied in `compute_dtype`.

    x float [..., k]; codes int8 [n, k], magnitudes and salient as in `dequantize_binary`; bias
    float [n] or None. Returns [..., n] in x's dtype.
    """
    n, k = codes.shape
    tokens, rows = x.to(compute_dtype), max(1, WEIGHTS_PER_PIECE // k)
    result = x.new_empty((*x.shape[:-1], n))
    for start in range(0, n, rows):
        piece = slice(start, min(n, start + rows))
        weight = dequantize_binary(
            codes[piece], magnitudes[piece], salient, block_size, compute_dtype
        )
        result[..., piece] = F.linear(tokens, weight)
    return result if bias is None else result.add_(bias)
