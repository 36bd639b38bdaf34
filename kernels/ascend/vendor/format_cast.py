"""npu_format_cast: the memory format of a weight, such as FRACTAL_NZ, which the cube core reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from panguq.kernels.ascend.vendor.contracts import OP_PLUGIN, PANGUQ, Broken, not_given
from panguq.kernels.ascend.vendor.library import define_npu_op

ND = 2
FRACTAL_NZ = 29


def _contract(
    input: Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None
) -> Iterator[Broken]:
    if acl_format not in (ND, FRACTAL_NZ):
        yield Broken(
            f"acl_format must be {ND} (ND) or {FRACTAL_NZ} (FRACTAL_NZ), not {acl_format}", PANGUQ
        )
    if acl_format == FRACTAL_NZ and input.dim() < 2:
        yield Broken(
            f"a FRACTAL_NZ tensor must have at least 2 dimensions, not {input.dim()}",
            OP_PLUGIN.format("npu_format_cast"),
        )
    yield from not_given({"customize_dtype": customize_dtype, "input_dtype": input_dtype}, PANGUQ)


def _fake(input: Tensor) -> Tensor:
    return torch.empty_like(input)


@define_npu_op(
    "npu_format_cast(Tensor input, int acl_format, *, int? customize_dtype=None,"
    " int? input_dtype=None) -> Tensor",
    _fake,
    contract=_contract,
    keeps_strides=True,
)
def npu_format_cast(
    input: Tensor,
    acl_format: int,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> Tensor:
    """The same tensor in the memory format `acl_format`: 29 is FRACTAL_NZ, 2 is ND.

    On an NPU the values, sizes and strides that a program sees stay, the bytes move. A CPU has no
    such formats, so here this is a copy: nothing about the order of bytes is modelled or checked.
    """
    return input.clone()
