"""npu_gelu, and npu_geglu: gelu of one half of a tensor times the other half."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.contracts import OP_PLUGIN, Broken, surely, wrong_dtype
from panguq.kernels.ascend.vendor.library import define_npu_op

_DOCS = OP_PLUGIN.format("npu_geglu")
_ACLNN = "aclnnGeGluV3"
_GELU_DOCS = OP_PLUGIN.format("npu_gelu")


def _gelu_contract(input: Tensor, approximate: str) -> Iterator[Broken]:
    floats = (torch.float32, torch.float16, torch.bfloat16)
    yield from wrong_dtype("input", input, floats, _GELU_DOCS)
    if approximate not in ("none", "tanh"):
        yield Broken(f"approximate must be 'none' or 'tanh', not {approximate!r}", _GELU_DOCS)
    if input.dim() > 8:
        yield Broken(f"input must have at most 8 dimensions, not {input.dim()}", _GELU_DOCS)


@define_npu_op(
    'npu_gelu(Tensor input, *, str approximate="none") -> Tensor',
    lambda input: input.new_empty(input.shape),
    contract=_gelu_contract,
)
def npu_gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """gelu of every element, exact ("none") or in its tanh form, in float32 and rounded once.

    op-plugin's page says that on an NPU PyTorch's own gelu has the tanh form, whatever it is asked.
    """
    wide = input.to(torch.float32, memory_format=torch.contiguous_format)
    return torch.nn.functional.gelu(wide, approximate=approximate).to(input.dtype)


def _contract(input: Tensor, dim: int, approximate: int) -> Iterator[Broken]:
    yield from wrong_dtype("input", input, (torch.float32, torch.float16, torch.bfloat16), _DOCS)
    if approximate not in (0, 1):
        yield Broken(f"approximate must be 0 or 1, not {approximate}", _DOCS)
    if not 1 <= input.dim() <= 8:
        yield Broken(f"input must have 1 to 8 dimensions, not {input.dim()}", _ACLNN)
        return
    if not -input.dim() <= dim < input.dim():
        yield Broken(f"dim must be from {-input.dim()} to {input.dim() - 1}, not {dim}", _DOCS)
    elif surely(input.shape[dim] % 2 != 0):
        yield Broken(f"input's size {input.shape[dim]} in dim {dim} must be even", _DOCS)


def _fake(input: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    shape = list(input.shape)
    shape[dim] = shape[dim] // 2
    return input.new_empty(shape), input.new_empty(shape)


@define_npu_op(
    "npu_geglu(Tensor input, int dim=-1, int approximate=1, bool activate_left=False)"
    " -> (Tensor, Tensor)",
    _fake,
    contract=_contract,
)
def npu_geglu(
    input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[Tensor, Tensor]:
    """gelu(a) * b and gelu(a), where a is the second half of `input` along `dim`, b the first.

    input float [..., 2f] -> two of [..., f] and the same dtype. `activate_left` swaps a and b;
    approximate is 0 for the exact gelu, 1 for its tanh form. In float32 with one rounding at the
    end of each result (the pages of op-plugin and aclnnGeGluV3 give the formula and leave that
    open).
    """
    left, right = input.to(torch.float32).chunk(2, dim)
    gate, other = (left, right) if activate_left else (right, left)
    active = torch.nn.functional.gelu(gate, approximate="tanh" if approximate else "none")
    return (active * other).to(input.dtype), active.to(input.dtype)
