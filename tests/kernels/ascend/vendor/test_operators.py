"""A call for which CANN has no operator of these dtypes and formats is refused with that reason."""

from __future__ import annotations

import pytest
import torch

from panguq.errors import LoweringError
from panguq.kernels.ascend.vendor import ops
from panguq.kernels.ascend.vendor.contracts import check_call, violations
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.operators import OPERATORS_910B, unlisted


@pytest.mark.parametrize("op", OPERATORS_910B)
def test_the_table_names_parameters_of_ops_that_panguq_emits(op) -> None:
    schema = getattr(torch.ops.npu, op).default._schema
    assert op in ops.__all__
    assert set(OPERATORS_910B[op].operands) <= {argument.name for argument in schema.arguments}
    width = len(OPERATORS_910B[op].operands)
    assert all(len(row.split()) == width for row in OPERATORS_910B[op].rows)


@pytest.mark.parametrize(
    ("op", "dtypes", "formats"),
    [
        ("npu_quant_matmul", {"x1": "int8", "x2": "int8"}, {}),
        ("npu_quant_matmul", {"x1": "int8", "x2": "int8"}, {"x2": "NZ"}),
        ("npu_quant_matmul", {"x1": "int32", "x2": "int32"}, {}),  # packed int4
        ("npu_grouped_matmul", {"x": "int8", "weight": "int8"}, {"weight": "NZ"}),
        ("npu_swiglu", {"input": "bfloat16"}, {}),
        ("npu_gelu", {"input": "float64"}, {}),  # not in the table
    ],
)
def test_what_is_listed_is_taken(op, dtypes, formats) -> None:
    assert unlisted(op, dtypes, formats) is None


@pytest.mark.parametrize(
    ("op", "dtypes", "formats", "said"),
    [
        ("npu_quant_matmul", {"x1": "float8_e4m3fn", "x2": "float8_e4m3fn"}, {}, "float8_e4m3fn"),
        ("npu_quant_matmul", {"x1": "int32", "x2": "int32"}, {"x1": "NZ"}, "x1 int32 in NZ"),
        ("npu_quant_matmul", {"x1": "float16", "x2": "int8"}, {}, "no x1 float16"),
        ("npu_dynamic_quant", {"input": "float32"}, {}, "DynamicQuant takes no input float32"),
        ("npu_swiglu", {"input": "int8"}, {}, "SwiGlu takes no input int8"),
        (
            "npu_grouped_matmul_swiglu_quant_v2",
            {"x": "int8", "weight": "int8"},
            {},
            "GroupedMatmulSwigluQuantV2 takes no x int8, weight int8",
        ),
    ],
)
def test_what_is_not_listed_is_refused(op, dtypes, formats, said) -> None:
    assert said in str(unlisted(op, dtypes, formats))


def test_a_compile_time_check_says_so() -> None:
    """float16 rows with a bfloat16 weight break no rule of the contract of RmsNorm's own."""
    x = torch.ones(2, 64, dtype=torch.float16)
    found = violations(ops.npu_rms_norm, (x, torch.ones(64, dtype=torch.bfloat16)), {})
    assert found and all("gamma" in str(one) for one in found)


def test_formats_are_asked_where_they_are_known() -> None:
    """aclnn takes int8 inputs in NZ only beside weights in NZ."""
    x = torch.ones(16, 64, dtype=torch.int8)
    call = (ops.npu_quant_matmul, (x, torch.ones(64, 64, dtype=torch.int8), torch.ones(64)))
    named = {"output_dtype": dtype_number(torch.bfloat16)}
    assert violations(*call, named, formats={"x1": "NZ", "x2": "NZ"}) == []
    (broken,) = violations(*call, named, formats={"x1": "NZ"})
    assert "takes no x1 int8 in NZ, x2 int8: it takes" in broken.rule
    check_call(*call, named, "q_proj")  # formats unknown
    with pytest.raises(LoweringError, match=r"q_proj: an Ascend NPU cannot run .*x1 int8 in NZ"):
        check_call(*call, named, "q_proj", formats={"x1": "NZ"})
