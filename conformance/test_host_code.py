"""torch_npu's C++ code takes the calls down to aclnn; what it passes is a golden file."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conformance.calls import Call, ask_host, ask_meta, call
from conformance.right_calls import all_calls

TOKENS = 17
# The results for a second quantization that was not asked for: the Meta kernel says empty, the C++
# code has no sizes at all. No graph reads them.
NOT_GIVEN = {"npu_add_rms_norm_dynamic_quant": (1, 4)}


@pytest.mark.parametrize(
    "one", [pytest.param(one, id=f"{name}: {one.op}") for name, one in all_calls()]
)
def test_results_are_those_of_the_meta_kernel(one: Call) -> None:
    """Two implementations of the same op's shapes."""
    answer, _ = ask_host(one, TOKENS)
    assert answer.refusal is None
    expected = ask_meta(one, TOKENS).results
    assert len(answer.results) == len(expected)
    for index, (found, wanted) in enumerate(zip(answer.results, expected, strict=True)):
        assert found == wanted or index in NOT_GIVEN.get(one.op, ())


def test_aclnn_calls_are_the_golden_ones(golden: Callable[[str, str], None]) -> None:
    """dtypes, sizes, strides, formats and attributes of every aclnn argument."""
    sections = []
    for name, one in all_calls():
        record = ask_host(one, TOKENS)[1]
        lines = [f"    {line}\n" for line in record.splitlines()] or ["    no aclnn call\n"]
        sections.append(f"{name}\n  {one}\n{''.join(lines)}")
    text = "\n".join(sections)
    assert "NOT-A-TENSOR" not in text
    assert "arguments not recorded" not in text
    golden("aclnn_calls", text)


def test_strides_and_formats_are_recorded() -> None:
    """A transposed view reaches aclnn as one, and what Python wants is what aclnn gets."""
    weight = call(
        "npu_quant_matmul", "int8[m, 64]", "int8[32, 64]^T", "float32[32]", output_dtype=15
    )
    assert "x2=int8[64, 32]:ND:strides[1, 64]" in ask_host(weight)[1]


def test_float32_scale_is_converted_before_the_matmul() -> None:
    """In eager mode a float16 result makes op-plugin convert the scale itself, every time."""
    unconverted = call(
        "npu_quant_matmul", "int8[m, 64]", "int8[64, 32]", "float32[32]", output_dtype=5
    )
    assert ask_host(unconverted)[1].startswith("aclnnTransQuantParamV3(")
