"""Values with a scale for each token, which follows from the token itself."""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.ir.ops import encode, quantize  # noqa: F401  (register the ops)
from panguq.ir.quant_spec import QuantSpec

panguq = torch.ops.panguq


def quantized_tokens(x: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """x `[..., k]` on the grid of a dynamic `spec`, as a graph computes it, in `dtype`."""
    value: Tensor
    if spec.is_integer:
        codes, scale = panguq.quantize_per_token(x, spec.quant_max)
        value = panguq.dequantize(codes, scale, None, dtype)
    else:
        codes, scale = panguq.encode_per_token(x, spec.format.name)
        value = panguq.decode_per_token(codes, scale, spec.format.name, dtype)
    return value
