"""The contract of npu_grouped_matmul on Atlas A2: one tensor of rows, one of all weights."""

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

# group_list holds the end of each expert's rows, their number, or pairs of expert and number.
CUMULATIVE, COUNTS, KEY_VALUE = 0, 1, 2
LARGEST_GROUPS = 1024
BY_ROWS = 0  # group_type: the rows are divided among the experts
LARGEST_W4A8_K = 18432
FLOAT_BIAS = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
}
_DOCS = OP_PLUGIN.format("npu_grouped_matmul")
_ACLNN = "aclnnGroupedMatmulV5"
_TILING = "CANN's tiling of GroupedMatmul"


@dataclass(frozen=True)
class GroupedOperands:
    """The tensors of a call, each out of the list of one that the op takes; None: not given."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    antiquant_scale: Tensor | None
    antiquant_offset: Tensor | None
    per_token_scale: Tensor | None

    @property
    def m(self) -> Size:
        return self.x.shape[0]

    @property
    def k(self) -> Size:
        return self.x.shape[1]

    @property
    def n(self) -> Size:
        packed = CODES_PER_WORD if self.weight.dtype == torch.int32 else 1
        return self.weight.shape[2] * packed

    @property
    def experts(self) -> Size:
        return self.weight.shape[0]


Tensors = Sequence[Tensor] | None


def grouped_matmul_contract(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensors,
    scale: Tensors,
    offset: Tensors,
    antiquant_scale: Tensors,
    antiquant_offset: Tensors,
    per_token_scale: Tensors,
    group_list: Tensor | None,
    activation_input: Tensors,
    activation_quant_scale: Tensors,
    activation_quant_offset: Tensors,
    split_item: int | None,
    group_type: int | None,
    group_list_type: int | None,
    act_type: int | None,
    tuning_config: Sequence[int] | None,
    output_dtype: int | None,
    x_dtype: int | None,
    weight_dtype: int | None,
    scale_dtype: int | None,
    per_token_scale_dtype: int | None,
    chip: Chip,
) -> Iterator[Broken]:
    """Yields each rule that the call breaks; sources beside each."""
    unused = {
        "offset": offset,
        "activation_input": activation_input,
        "activation_quant_scale": activation_quant_scale,
        "activation_quant_offset": activation_quant_offset,
        "tuning_config": tuning_config,
        "x_dtype": x_dtype,
        "weight_dtype": weight_dtype,
        "scale_dtype": scale_dtype,
        "per_token_scale_dtype": per_token_scale_dtype,
    }
    yield from not_given(unused, PANGUQ)
    lists: dict[str, Tensors] = {
        "x": x, "weight": weight, "bias": bias, "scale": scale, "antiquant_scale": antiquant_scale,
        "antiquant_offset": antiquant_offset, "per_token_scale": per_token_scale,
    }  # fmt: skip
    for name, tensors in lists.items():
        if tensors is not None and len(tensors) != 1:
            yield Broken(f"{name} must be a list of one tensor, not of {len(tensors)}", PANGUQ)
            return
    given = GroupedOperands(**{name: one[0] if one else None for name, one in lists.items()})  # type: ignore[arg-type]
    if group_type != BY_ROWS:
        yield Broken(f"group_type must be {BY_ROWS}, not {group_type}", PANGUQ)
    if split_item not in (2, 3):
        yield Broken(f"split_item must be 2 or 3, for one result, not {split_item}", _DOCS)
    if act_type != 0:
        yield Broken(f"act_type must be 0, not {act_type}", PANGUQ)
    if given.x.dim() != 2 or given.weight.dim() != 3:
        yield Broken(
            "x must have shape [rows, k] and weight [experts, k, n], not"
            f" {list(given.x.shape)} and {list(given.weight.shape)}",
            _ACLNN,
        )
        return
    yield from _sizes(given, chip.largest_dimension)
    yield from _group_list(given, group_list, group_list_type)
    yield from _scheme(given, dtype_of(output_dtype, given.x.dtype))


def _sizes(given: GroupedOperands, largest: int) -> Iterator[Broken]:
    if surely(given.k != given.weight.shape[1]):
        yield Broken(f"x's k {given.k} must equal weight's k {given.weight.shape[1]}", _DOCS)
    for name, size in (("k", given.k), ("n", given.n)):
        if surely(size < 1) or surely(size > largest):
            yield Broken(f"{name} must be from 1 to {largest}, not {size}", _ACLNN)
    yield from not_contiguous("x", given.x, _ACLNN)
    if given.weight.dtype == torch.int32:
        yield from not_contiguous("weight", given.weight, _ACLNN)


def _group_list(
    given: GroupedOperands, group_list: Tensor | None, kind: int | None
) -> Iterator[Broken]:
    if surely(given.experts > LARGEST_GROUPS):
        yield Broken(f"there may be at most {LARGEST_GROUPS} experts, not {given.experts}", _ACLNN)
    if group_list is None:
        yield Broken("group_list must be given", _DOCS)
        return
    yield from wrong_dtype("group_list", group_list, (torch.int64,), _DOCS)
    if kind not in (CUMULATIVE, COUNTS, KEY_VALUE):
        yield Broken(f"group_list_type must be 0, 1 or 2, not {kind}", _DOCS)
        return
    shape = [given.experts, 2] if kind == KEY_VALUE else [given.experts]
    yield from wrong_shape("group_list", group_list, [shape], _DOCS)
    if kind == COUNTS and surely(given.experts == 1):
        yield Broken("group_list must not be the count of a single expert", _DOCS)
    dtypes = (given.x.dtype, given.weight.dtype)
    if kind == KEY_VALUE and dtypes != (torch.int8, torch.int8):
        yield Broken("group_list_type must be 0 or 1 unless x and weight are int8", _TILING)
    if kind == CUMULATIVE and dtypes == (torch.int8, torch.int32):
        yield Broken("group_list_type must be 1: with 4-bit weights counts are read", _ACLNN)


def _scheme(given: GroupedOperands, output: torch.dtype | None) -> Iterator[Broken]:
    """The dtypes that go together, by those of x and weight."""
    kinds = (given.x.dtype, given.weight.dtype)
    if kinds == (torch.int8, torch.int8):
        yield from _int8(given, output)
    elif kinds == (torch.int8, torch.int32):
        yield from _int8_by_int4(given, output)
    elif given.x.dtype in FLOAT_BIAS and given.weight.dtype == given.x.dtype:
        unused = {
            "antiquant_scale": given.antiquant_scale,
            "antiquant_offset": given.antiquant_offset,
        }
        yield from not_given(unused, _ACLNN)
        yield from _float(given, output)
    elif given.x.dtype in (torch.float16, torch.bfloat16) and given.weight.dtype in (
        torch.int8,
        torch.int32,
    ):
        yield from _weight_only(given)
        yield from _float(given, output)
    else:
        yield Broken(
            "x and weight must be floats of one dtype, 16-bit floats and int8 or int32 (packed"
            f" int4), or int8 and int8 or int32, not {names(kinds[:1])} and {names(kinds[1:])}",
            _ACLNN,
        )


def _float(given: GroupedOperands, output: torch.dtype | None) -> Iterator[Broken]:
    x = given.x.dtype
    yield from not_given({"scale": given.scale, "per_token_scale": given.per_token_scale}, _ACLNN)
    source = f"{_ACLNN}, for {names([x])} inputs"
    yield from wrong_dtype("bias", given.bias, (FLOAT_BIAS[x],), source)
    yield from wrong_shape("bias", given.bias, [[given.experts, given.n]], _ACLNN)
    if output != x:
        yield Broken(f"output_dtype must be {names([x])}, as x is, not {output}", source)


def _weight_only(given: GroupedOperands) -> Iterator[Broken]:
    scale, offset = given.antiquant_scale, given.antiquant_offset
    if scale is None or offset is None:
        yield Broken("antiquant_scale and antiquant_offset must be given", _ACLNN)
        return
    yield from wrong_dtype("antiquant_scale", scale, (given.x.dtype,), _ACLNN)
    yield from wrong_dtype("antiquant_offset", offset, (given.x.dtype,), _ACLNN)
    shapes: list[Sequence[Size]] = [[given.experts, given.n]]
    if given.weight.dtype == torch.int32 and scale.dim() == 3:
        shapes = [[given.experts, scale.shape[1], given.n]]
        if surely(given.k % scale.shape[1] != 0):
            yield Broken(f"{scale.shape[1]} groups must divide k {given.k}", _ACLNN)
    yield from wrong_shape("antiquant_scale", scale, shapes, _ACLNN)
    yield from wrong_shape("antiquant_offset", offset, [scale.shape], _ACLNN)


def _int8(given: GroupedOperands, output: torch.dtype | None) -> Iterator[Broken]:
    """int8 x int8: the sums themselves, or scaled for each output and, if given, each row."""
    unused = {"antiquant_scale": given.antiquant_scale, "antiquant_offset": given.antiquant_offset}
    yield from not_given(unused, _ACLNN)
    yield from wrong_shape("bias", given.bias, [[given.experts, given.n]], _ACLNN)
    if output == torch.int32:
        unused = {"scale": given.scale, "per_token_scale": given.per_token_scale}
        yield from not_given(unused, f"{_ACLNN}, for int32 results")
        yield from wrong_dtype("bias", given.bias, (torch.int32,), _ACLNN)
        return
    if given.scale is None:
        yield Broken("scale must be given, or output_dtype be int32", _ACLNN)
        return
    source = f"{_ACLNN}, for {output} results"
    if output == torch.bfloat16:
        late = given.bias is not None and given.bias.dtype == torch.bfloat16
        wide = (torch.float32,) if late else ()
        yield from wrong_dtype("scale", given.scale, (torch.bfloat16, *wide), source)
        yield from wrong_dtype("bias", given.bias, (torch.int32, torch.bfloat16), source)
    elif output == torch.float16:
        yield from wrong_dtype("scale", given.scale, (torch.float32,), source)
        yield from wrong_dtype("bias", given.bias, (torch.int32,), source)
    else:
        yield Broken(
            f"output_dtype must be float16, bfloat16 or int32 for int8 inputs, not {output}", PANGUQ
        )
    yield from wrong_shape("scale", given.scale, [[given.experts, given.n]], _ACLNN)
    yield from _per_token(given)


def _per_token(given: GroupedOperands) -> Iterator[Broken]:
    yield from wrong_dtype("per_token_scale", given.per_token_scale, (torch.float32,), _ACLNN)
    yield from wrong_shape("per_token_scale", given.per_token_scale, [[given.m]], _ACLNN)


def _int8_by_int4(given: GroupedOperands, output: torch.dtype | None) -> Iterator[Broken]:
    """int8 x int4: a scale for each output, or one for each 256 inputs."""
    unused = {"antiquant_scale": given.antiquant_scale, "antiquant_offset": given.antiquant_offset}
    yield from not_given(unused, _ACLNN)
    if surely(given.k % 64 != 0) or surely(given.k > LARGEST_W4A8_K):
        yield Broken(f"k must be a multiple of 64 up to {LARGEST_W4A8_K}, not {given.k}", _TILING)
    scale, bias = given.scale, given.bias
    for name, tensor in (
        ("scale", scale),
        ("bias", bias),
        ("per_token_scale", given.per_token_scale),
    ):
        if tensor is None:
            yield Broken(f"{name} must be given", _ACLNN)
    yield from wrong_dtype("scale", scale, (torch.int64,), _ACLNN)
    shapes: list[Sequence[Size]] = [[given.experts, 1, given.n]]
    if not surely(given.k % W4A8_GROUP != 0):
        shapes.append([given.experts, given.k // W4A8_GROUP, given.n])
    yield from wrong_shape("scale", scale, shapes, _TILING)
    yield from wrong_dtype("bias", bias, (torch.float32,), _ACLNN)
    yield from wrong_shape("bias", bias, [[given.experts, given.n]], _ACLNN)
    yield from _per_token(given)
    if output not in (torch.float16, torch.bfloat16):
        yield Broken(f"output_dtype must be float16 or bfloat16, not {output}", _ACLNN)
