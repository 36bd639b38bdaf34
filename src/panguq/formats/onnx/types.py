"""Value types in ONNX's terms.

Values of float16 and bfloat16 are carried as float32, in which every such number is exact, and
are rounded where the graph rounds them: onnxruntime's CPU kernels compute in neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from onnx import TensorProto
from torch import Tensor

from panguq.errors import PanguqError
from panguq.ir.text.value_types import Names, spell_size
from panguq.tensors.dtypes import dtype_name

OnnxShape = tuple[int | str, ...]
"""Sizes: numbers, or the text of a symbolic one, `past + seq`."""

STORED: dict[torch.dtype, int] = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
NARROW = (torch.float16, torch.bfloat16)


def stored_type(dtype: torch.dtype, where: str) -> int:
    """The type of a weight in the file: its own. Raises PanguqError if ONNX has no such type."""
    if dtype not in STORED:
        raise PanguqError(
            f"{where} is {str(dtype).removeprefix('torch.')}, which ONNX export does not know",
            "the dtypes are " + ", ".join(map(dtype_name, STORED)),
        )
    return STORED[dtype]


def carried(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a value of `dtype` travels between nodes."""
    return torch.float32 if dtype in NARROW else dtype


def carried_type(dtype: torch.dtype, where: str) -> int:
    """`carried` as ONNX's number."""
    return stored_type(carried(dtype), where)


def onnx_shape(value: Tensor, names: Names) -> OnnxShape:
    """A value type's sizes."""
    return tuple(
        spell_size(size, names) if isinstance(size, torch.SymInt) else int(size)
        for size in value.shape
    )


def nbytes(elem_type: int, shape: Sequence[int]) -> int:
    """Bytes of a stored tensor; int4 takes half a byte, rounded up as a whole."""
    count = 1
    for size in shape:
        count *= size
    if elem_type == TensorProto.INT4:
        return (count + 1) // 2
    return count * _ITEM_BYTES[elem_type]


_ITEM_BYTES = {elem_type: dtype.itemsize for dtype, elem_type in STORED.items()}


def known_size(size: Any) -> int | None:
    """The size where it does not depend on the input."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if isinstance(expression, sympy.Integer) else None
    return int(size)
