"""One matmul, several kernels: which one runs is decided by the number of tokens at run time.

All kernels of a table read the same stored bytes and give the same result up to the order of
summation, so that a table that is wrong can only be slow.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from panguq.errors import LoweringError
from panguq.ir.ops.opset import define_op
from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.own import w4a16, w8a8  # noqa: F401  (ops that tables name)
from panguq.kernels.ascend.own.int4_weight import QUARTERS
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (ops that tables name)
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.lowering.problem import Candidate

npu = torch.ops.npu
own = torch.ops.panguq_npu
NO_LIMIT = 2**31 - 1
CODES_OF_WORD = {torch.int32: CODES_PER_WORD, torch.int16: QUARTERS}
"""4-bit codes in a word, by the dtype of words."""


_SPELLING = re.compile(
    r"(?P<kernel>[a-z0-9_]+)(?: splits=(?P<splits>[1-9][0-9]{0,4}))?"
    r"(?: tile=(?P<m>[1-9][0-9]{0,4})x(?P<n>[1-9][0-9]{0,4})x(?P<k>[1-9][0-9]{0,4}))?"
)


@functools.cache
def parse_kernel(text: str) -> Candidate:
    """The kernel that `str(candidate)` spelled: `w4a16_split_k splits=8 tile=16x128x256`.

    Raises LoweringError for anything else.
    """
    found = _SPELLING.fullmatch(text)
    if found is None or found["kernel"] not in _CALLS:
        raise LoweringError(
            f"{text[:80]!r} spells no kernel", f"the kernels are {', '.join(sorted(_CALLS))}"
        )
    tile = (int(found["m"]), int(found["n"]), int(found["k"])) if found["m"] else None
    return Candidate(found["kernel"], splits=int(found["splits"] or 1), tile=tile)


@dataclass(frozen=True)
class Operands:
    """What the kernels of a table read: nodes while a graph is built, tensors when it runs.

    x `[m, k]`: int8 codes, or 16-bit floats for weight-only matmuls. weight: int8 `[k, n]`, or
    int32 `[k, n / 8]` or int16 `[k, n / 4]` of 4-bit codes. scale `[n]` or `[k / group_size, n]`;
    offset (weight-only) of the same shape, added to the codes; pertoken_scale float32 `[m]`; bias
    `[n]`; `group_size` is 0 per channel.
    """

    x: Any
    weight: Any
    scale: Any
    offset: Any
    pertoken_scale: Any
    bias: Any
    group_size: int
    output_dtype: torch.dtype


OpCall = tuple[OpOverload, tuple[Any, ...], dict[str, Any]]


def kernel_call(kernel: Candidate, given: Operands) -> OpCall:
    """Op, arguments and keyword arguments of a kernel's call."""
    return _CALLS[kernel.kernel](kernel, given)


def _quant_matmul(kernel: Candidate, given: Operands) -> OpCall:
    named: dict[str, Any] = {"output_dtype": dtype_number(given.output_dtype)}
    if given.pertoken_scale is not None:
        named["pertoken_scale"] = given.pertoken_scale
    if given.bias is not None:
        named["bias"] = given.bias
    return npu.npu_quant_matmul.default, (given.x, given.weight, given.scale), named


def _weight_quant(kernel: Candidate, given: Operands) -> OpCall:
    args = (given.x, given.weight, given.scale, given.offset, None, None, given.bias)
    return npu.npu_weight_quant_batchmatmul.default, (*args, given.group_size), {}


def _own_w8a8(kernel: Candidate, given: Operands) -> OpCall:
    args = (given.x, given.weight, given.scale, given.pertoken_scale, given.bias)
    how = (given.output_dtype, kernel.splits, list(kernel.tile or ()))
    return own.w8a8.default, (*args, *how), {}


def _own_w4a16(kernel: Candidate, given: Operands) -> OpCall:
    args = (given.x, given.weight, given.scale, given.offset, given.bias, given.group_size)
    return own.w4a16.default, (*args, kernel.splits, list(kernel.tile or ())), {}


_CALLS = {
    "npu_quant_matmul": _quant_matmul,
    "npu_weight_quant_batchmatmul": _weight_quant,
    "w8a8_data_parallel": _own_w8a8,
    "w8a8_split_k": _own_w8a8,
    "w4a16_data_parallel": _own_w4a16,
    "w4a16_split_k": _own_w4a16,
}


def row_for(last_m: list[int], m: int) -> int:
    """The table's row for m tokens: the first whose last m is not smaller."""
    return next((row for row, last in enumerate(last_m) if m <= last), len(last_m) - 1)


def _fake_dispatch_matmul(x: Tensor, weight: Tensor, output_dtype: torch.dtype) -> Tensor:
    n = weight.shape[1] * CODES_OF_WORD.get(weight.dtype, 1)
    return x.new_empty((x.shape[0], n), dtype=output_dtype)


@define_op(
    "dispatch_matmul(Tensor x, Tensor weight, Tensor scale, Tensor? offset,"
    " Tensor? pertoken_scale, Tensor? bias, int group_size, ScalarType output_dtype,"
    " int[] last_m, str[] kernels) -> Tensor",
    fake=_fake_dispatch_matmul,
)
def dispatch_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    output_dtype: torch.dtype,
    last_m: list[int],
    kernels: list[str],
) -> Tensor:
    """The matmul of x `[m, k]` by the kernel that the table names for m; see `Operands`.

    `kernels[i]` serves m up to `last_m[i]`, which ascends; the last one serves all larger m.
    """
    given = Operands(x, weight, scale, offset, pertoken_scale, bias, group_size, output_dtype)
    kernel = parse_kernel(kernels[row_for(last_m, x.shape[0])])
    op, args, named = kernel_call(kernel, given)
    return op(*args, **named)
