"""In which memory format the operands of a call in a graph lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from panguq.ir.ops.opset import bind
from panguq.kernels.ascend.vendor import format_cast  # noqa: F401  (registers the op)
from panguq.kernels.ascend.vendor.format_cast import FRACTAL_NZ

FORMAT_CAST = torch.ops.npu.npu_format_cast.default


def formats_of(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """The parameters of a call of nodes whose operand is "NZ"; all others are ND.

    An operand lies in the format that it was cast to. What an op makes is ND.
    """
    try:
        given = bind(op._schema.arguments, args, kwargs)
    except TypeError:  # the op's contract says so, in its own words
        return {}
    return {name: "NZ" for name, value in given.items() if _is_nz(value)}


def _is_nz(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_nz(one) for one in value)
    if not isinstance(value, fx.Node) or value.target is not FORMAT_CAST:
        return False
    named = bind(FORMAT_CAST._schema.arguments, value.args, value.kwargs)
    return bool(named["acl_format"] == FRACTAL_NZ)
