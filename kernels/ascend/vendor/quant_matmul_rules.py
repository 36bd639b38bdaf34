"""The contract of npu_quant_matmul on Atlas A2: int8 x int8, int8 x int4 and int4 x int4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.limits import CODES_PER_WORD, W4A8_GROUP
from panguq.kernels.ascend.vendor.contracts import (
    OP_PLUGIN,
    PANGUQ,
    Broken,
    Size,
    names,
    not_contiguous,
    not_given,
    surely,
    wrong_dtype,
    wrong_shape,
)
from panguq.kernels.ascend.vendor.dtypes import dtype_of

_DOCS = OP_PLUGIN.format("npu_quant_matmul")
_META = "torch_npu's Meta kernel for npu_quant_matmul"
_ACLNN = "aclnnQuantMatmulV5"
_INT4 = f"{_ACLNN}, int8 x int4 with groups of {W4A8_GROUP}"


@dataclass(frozen=True)
class _Row:
    """A line of the documented table: what goes with an output dtype with or without pertoken."""

    scale: tuple[torch.dtype, ...]
    bias: tuple[torch.dtype, ...]
    offset: tuple[torch.dtype, ...] = ()


_FLOAT_OR_BFLOAT = (torch.float32, torch.bfloat16)
# Without pertoken_scale a float32 scale is legal too for float16 and int8, but not in a graph.
_CONVERTED = (torch.int64,)
_BFLOAT16_ROW = _Row(_FLOAT_OR_BFLOAT, (torch.int32, torch.bfloat16, torch.float32))
# op-plugin prints bfloat16 for this bias, aclnnQuantMatmulV5 float16: with a float16 output the
# second is the one that can be meant.
_FLOAT16_ROW = _Row((torch.float32,), (torch.int32, torch.float16, torch.float32))

_INT8_ROWS = {
    (torch.float16, False): _Row(_CONVERTED, (torch.int32,)),
    (torch.int8, False): _Row(_CONVERTED, (torch.int32,), offset=(torch.float32,)),
    (torch.bfloat16, False): _BFLOAT16_ROW,
    (torch.bfloat16, True): _BFLOAT16_ROW,
    (torch.float16, True): _FLOAT16_ROW,
    (torch.int32, False): _Row(_FLOAT_OR_BFLOAT, (torch.int32,)),
}
_INT4_ROWS = {
    (torch.float16, False): _Row(_CONVERTED, (torch.int32,)),
    (torch.float16, True): _FLOAT16_ROW,
    (torch.bfloat16, True): _BFLOAT16_ROW,
}


def quant_matmul_contract(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: int | None,
    x1_dtype: int | None,
    x2_dtype: int | None,
    pertoken_scale_dtype: int | None,
    scale_dtype: int | None,
    group_sizes: Sequence[int] | None,
    y_scale: Tensor | None,
    chip: Chip,
) -> Iterator[Broken]:
    """Yields each rule that the call breaks; sources beside each."""
    dtype_arguments = {
        "x1_dtype": x1_dtype,
        "x2_dtype": x2_dtype,
        "pertoken_scale_dtype": pertoken_scale_dtype,
        "scale_dtype": scale_dtype,
        "y_scale": y_scale,
    }
    yield from not_given(dtype_arguments, f"{_ACLNN}: not on Atlas A2")
    kinds = (x1.dtype, x2.dtype)
    if kinds not in ((torch.int8, torch.int8), (torch.int8, torch.int32), (torch.int32,) * 2):
        yield Broken(
            "x1 and x2 must be int8 and int8, int8 and int32 (packed int4), or int32 and int32,"
            f" not {names([x1.dtype])} and {names([x2.dtype])}",
            _ACLNN,
        )
        return
    if not 2 <= x1.dim() <= 6:
        yield Broken(f"x1 must have 2 to 6 dimensions, not {x1.dim()}", _META)
        return
    if x2.dim() != 2:
        yield Broken(f"x2 must have 2 dimensions, not {x2.dim()}", PANGUQ)
        return
    k = x1.shape[-1] * (CODES_PER_WORD if x1.dtype == torch.int32 else 1)
    n = x2.shape[1] * (CODES_PER_WORD if x2.dtype == torch.int32 else 1)
    yield from _sizes(x1, x2, k, n, chip.largest_dimension)
    output = dtype_of(output_dtype, torch.int8)
    if kinds == (torch.int8, torch.int32):
        given = (scale, offset, pertoken_scale, bias, output, group_sizes)
        yield from _int8_by_int4(x1, *given, n, chip.w4a8_smallest_refused_k)
        return
    yield from not_given({"group_sizes": group_sizes}, PANGUQ)
    yield from _table(kinds, scale, offset, pertoken_scale, bias, output)
    yield from wrong_shape("scale", scale, [[n], [1]], _META)
    yield from wrong_shape("offset", offset, [[n], [1]], _META)
    if pertoken_scale is not None:
        yield from wrong_shape("pertoken_scale", pertoken_scale, [[x1.shape[-2]]], _DOCS)
        if any(not surely(size == 1) for size in x1.shape[:-2]):
            yield Broken(
                f"x1 must have shape [m, {k}] with a pertoken_scale [m], not {list(x1.shape)}",
                _DOCS,
            )
    biases: list[Sequence[Size]] = [[n]]
    if x1.dim() == 3 and x1.dtype == torch.int8:
        biases.append([x1.shape[0], 1, n])
    yield from wrong_shape("bias", bias, biases, _DOCS)


def _sizes(x1: Tensor, x2: Tensor, k: Size, n: Size, largest: int) -> Iterator[Broken]:
    if surely(k != x2.shape[0]):
        yield Broken(f"x1's k {k} must equal x2's k {x2.shape[0]}", _META)
    for what, size in (("m", x1.shape[-2]), ("k", k), ("n", n)):
        if surely(size < 1):
            yield Broken(f"{what} must be at least 1, not {size}", _DOCS)
    for what, size in (("k", k), ("n", n)):
        if surely(size > largest):
            yield Broken(f"{what} must be at most {largest}, not {size}", _DOCS)
    if x2.dtype == torch.int32:
        # The page also allows the transposed view of a contiguous [n, k / 8].
        yield from not_contiguous("x2", x2, PANGUQ)
        if x1.dtype == torch.int32:
            yield from not_contiguous("x1", x1, _DOCS)


def _table(
    kinds: tuple[torch.dtype, torch.dtype],
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output: torch.dtype | None,
) -> Iterator[Broken]:
    """The dtypes that go together on Atlas A2."""
    rows = _INT8_ROWS if kinds == (torch.int8, torch.int8) else _INT4_ROWS
    yield from wrong_dtype("pertoken_scale", pertoken_scale, (torch.float32,), _DOCS)
    per_token = pertoken_scale is not None
    row = next((rows[key] for key in rows if key == (output, per_token)), None)
    if row is None:
        legal = [dtype for dtype, with_pertoken in rows if with_pertoken == per_token]
        which = "with" if per_token else "without"
        yield Broken(
            f"output_dtype must be {names(legal)} {which} pertoken_scale for {names(kinds[:1])}"
            f" inputs, not {output}",
            _ACLNN,
        )
        return
    if row.scale == _CONVERTED and scale.dtype == torch.float32:
        yield Broken(
            "scale must be int64, made by npu_trans_quant_param: a graph may not pass float32 for"
            f" a {names([output] if output else [])} output without pertoken_scale",
            _DOCS,
        )
    else:
        yield from wrong_dtype("scale", scale, row.scale, _ACLNN)
    yield from wrong_dtype("bias", bias, row.bias, _ACLNN)
    if row.offset:
        yield from wrong_dtype("offset", offset, row.offset, _ACLNN)
    else:
        yield from not_given({"offset": offset}, _ACLNN)


def _int8_by_int4(
    x1: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output: torch.dtype | None,
    group_sizes: Sequence[int] | None,
    n: Size,
    smallest_refused_k: int,
) -> Iterator[Broken]:
    """int8 x int4: one scale per token and one per group of 256 inputs, no bias."""
    if x1.dim() != 2:
        yield Broken(f"x1 must have shape [m, k], not {list(x1.shape)}", _INT4)
        return
    m, k = x1.shape
    if surely(k % W4A8_GROUP != 0):
        yield Broken(f"k must be a multiple of {W4A8_GROUP}, not {k}", _INT4)
    if surely(k >= smallest_refused_k):
        yield Broken(f"k must be less than {smallest_refused_k}, not {k}", _INT4)
    yield from wrong_dtype("scale", scale, (torch.int64,), _META)
    yield from wrong_shape("scale", scale, [[k // W4A8_GROUP, n]], _META)
    for what, tensor, shape in (
        ("offset", offset, [n]),
        ("pertoken_scale", pertoken_scale, [m, 1]),
    ):
        if tensor is None:
            yield Broken(f"{what} must be given", _INT4)
        yield from wrong_dtype(what, tensor, (torch.float32,), _META)
        yield from wrong_shape(what, tensor, [shape], _INT4)
    yield from not_given({"bias": bias}, _INT4)
    if output not in (torch.float16, torch.bfloat16):
        yield Broken(f"output_dtype must be float16 or bfloat16, not {output}", _META)
    if group_sizes is not None and list(group_sizes) not in ([], [0, 0, W4A8_GROUP]):
        yield Broken(f"group_sizes must be [0, 0, {W4A8_GROUP}], not {list(group_sizes)}", _INT4)
