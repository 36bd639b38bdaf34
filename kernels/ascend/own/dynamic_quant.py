"""Per-token dynamic quantization by panguq's own kernel: one scale per token, int8 codes.

The body here is what the Triton kernel in `triton/dynamic_quant.py` computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panguq.errors import LoweringError
from panguq.ir.ops.opset import define_op
from panguq.kernels.ascend.own.triton.launch import NAMESPACE, launch_dynamic_quant

LARGEST_CODE = 127
SMALLEST_NORMAL = 2.0**-126
X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refusal(m: int | None, k: int) -> str | None:
    """Why the kernel cannot quantize m tokens (None: any) of k values."""
    return f"k={k}: a token without values has no scale" if k < 1 else None


def _check(x: Tensor) -> None:
    if x.dtype not in X_DTYPES:
        raise LoweringError(f"{NAMESPACE}.dynamic_quant: x is {x.dtype}, not a float dtype")
    if x.dim() < 1:
        raise LoweringError(f"{NAMESPACE}.dynamic_quant: x is a scalar")
    if reason := refusal(None, x.shape[-1]):
        raise LoweringError(f"{NAMESPACE}.dynamic_quant: {reason}")


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@define_op(
    "dynamic_quant(Tensor x) -> (Tensor codes, Tensor scale)",
    fake=_fake,
    namespace=NAMESPACE,
    check=_check,
    npu=launch_dynamic_quant,
)
def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """scale = max|x| / 127 of each token, code = x / scale rounded to nearest, ties to even.

    x float [..., k]; returns int8 [..., k] and float32 [...]. Computed in float32; a token whose
    scale is 0 or subnormal has codes 0. Raises LoweringError.
    """
    values = x.contiguous().to(torch.float32)
    scale = values.abs().amax(dim=-1).div_(LARGEST_CODE)
    # A subnormal scale has few digits: a quotient could be beyond 127.
    divisor = torch.where(scale >= SMALLEST_NORMAL, scale, torch.inf).unsqueeze(-1)
    return torch.round(values / divisor).to(torch.int8), scale
