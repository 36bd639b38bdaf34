"""torchair converts the calls to GE operators; operators, attributes and dtypes are golden."""

from __future__ import annotations

from collections.abc import Callable

from conformance.calls import call
from conformance.ge_graph import ask_torchair
from conformance.right_calls import all_calls

# torchair 2.13.0 has written none: the first runs once, when a model is loaded; the second stands
# for an inexact fusion that is off unless it is asked for. (With CANN there, torchair looks for a
# GE operator of that name.)
WITHOUT_CONVERTER = (
    "npu_convert_weight_to_int4pack",
    "npu_add_rms_norm_quant",
    "npu_moe_token_unpermute",
)


def test_operators_are_the_golden_ones(golden: Callable[[str, str], None]) -> None:
    """One call at a time; whole graphs are in test_graphs.py."""
    sections = []
    for name, one in all_calls():
        if one.op not in WITHOUT_CONVERTER:
            answer, operators = ask_torchair(one)
            assert answer.refusal is None, f"{one}: {answer.refusal}"
            lines = "".join(f"    {line}\n" for line in operators)
            sections.append(f"{name}\n  {one}\n{lines}")
    golden("ge_operators", "\n".join(sections))


def test_an_op_without_converter_is_refused() -> None:
    """torchair itself may put a placeholder into the graph and go on."""
    found = {one.op: one for _, one in all_calls() if one.op in WITHOUT_CONVERTER}
    assert set(found) == set(WITHOUT_CONVERTER)
    for one in found.values():
        assert "no converter" in (ask_torchair(one)[0].refusal or "")


def test_float16_inputs_of_an_int8_matmul_are_refused() -> None:
    """A check of the converter's own, which neither the Meta kernel nor the C++ code makes."""
    wrong = call("npu_quant_matmul", "float16[m, 64]", "float16[64, 32]", "float32[32]",
                 output_dtype=15)  # fmt: skip
    answer, _ = ask_torchair(wrong)
    assert answer.refusal is not None
    assert "only supports int8 or int32" in answer.refusal
