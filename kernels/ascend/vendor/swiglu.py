"""npu_swiglu: silu of the first half of a tensor times the second half."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    Broken,
    not_contiguous,
    surely,
    wrong_dtype,
)
from panguq.kernels.ascend.vendor.library import define_npu_op

_DOCS = OP_PLUGIN.format("npu_swiglu")


def _contract(input: Tensor, dim: int) -> Iterator[Broken]:
    yield from wrong_dtype("input", input, (torch.float32, torch.float16, torch.bfloat16), _DOCS)
    if not 1 <= input.dim() <= 8:
        yield Broken(f"input must have 1 to 8 dimensions, not {input.dim()}", _DOCS)
        return
    yield from not_contiguous("input", input, _DOCS)
    if not -input.dim() <= dim < input.dim():
        yield Broken(f"dim must be from {-input.dim()} to {input.dim() - 1}, not {dim}", _DOCS)
    elif surely(input.shape[dim] % 2 != 0):
        yield Broken(f"input's size {input.shape[dim]} in dim {dim} must be even", _DOCS)
    if any(surely(size < 1) for size in input.shape):
        yield Broken(f"input must have elements, not shape {list(input.shape)}", _DOCS)


def _fake(input: Tensor, dim: int) -> Tensor:
    shape = list(input.shape)
    shape[dim] = shape[dim] // 2
    return input.new_empty(shape)


@define_npu_op("npu_swiglu(Tensor input, int dim=-1) -> Tensor", _fake, contract=_contract)
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(a) * b, where a and b are the first and the second half of `input` along `dim`.

    input float [..., 2f] -> [..., f] of the same dtype; in float32 with one rounding at the end,
    as in ops-nn's comparison function for it (op-plugin's page gives the formula).
    """
    gate, up = input.to(torch.float32).chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)
