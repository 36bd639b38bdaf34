"""The schemas that panguq writes down are those of the loaded library."""

from __future__ import annotations

import pytest
import torch

from panguq.kernels.ascend.vendor.library import NpuOp, npu_ops

OPS = npu_ops()


def real_schema(name: str) -> str:
    """The schema as torch_npu registered it, in PyTorch's own spelling."""
    schemas = torch._C._jit_get_schemas_for_operator(f"npu::{name}")
    return next(str(schema) for schema in schemas if not schema.overload_name)


def normal(schema: str) -> str:
    """PyTorch's spelling of a schema: defaults such as 1e-06 have more than one."""
    return str(torch._C.parse_schema(schema))


def test_there_are_ops() -> None:
    """A table that lost its ops must not pass."""
    assert len(OPS) >= 6


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.op.name())
def test_schema_is_the_real_one(op: NpuOp) -> None:
    """Names, types, order and defaults of all arguments and results."""
    assert not op.defined_here, "torch_npu has not defined this op"
    name = op.op.name().removeprefix("npu::")
    assert normal(f"npu::{op.schema}") == normal(real_schema(name))


def test_a_changed_default_is_seen() -> None:
    """The comparison is of text that holds the defaults."""
    real = real_schema("npu_quantize")
    assert normal(real) != normal(real.replace("int axis=1", "int axis=-1"))
