"""Calls as lowered graphs make them: contract, Meta kernel and panguq's fake agree."""

from __future__ import annotations

import pytest

from conformance.calls import (
    Call,
    ask_contract,
    ask_meta,
    ask_symbolic,
    call,
)
from conformance.right_calls import SHAPES_7B, all_calls
from panguq.kernels.ascend.vendor.library import npu_op

CALLS = [
    pytest.param(one, id=f"{size} {name}: {one.op}")
    for size, calls in (("1B", all_calls()), ("7B", all_calls(SHAPES_7B)))
    for name, one in calls
]
TOKENS = (1, 17, 2048)


@pytest.mark.parametrize("one", CALLS)
def test_contract_and_meta_kernel_take_it(one: Call) -> None:
    """For one token, a few, and a prefill."""
    for m in TOKENS:
        assert ask_contract(one, m).refusal is None
        assert ask_meta(one, m).refusal is None


@pytest.mark.parametrize("one", CALLS)
def test_number_of_tokens_stays_symbolic(one: Call) -> None:
    """The Meta kernel fixes no size: a graph is exported once for all m."""
    answer, fixed = ask_symbolic(one, "npu")
    assert answer.refusal is None
    assert fixed is None
    takes_tokens = any("m" in str(a) for a in (*one.args, *one.kwargs.values()) if "[" in str(a))
    assert any("m" in result for result in answer.results) == takes_tokens


@pytest.mark.parametrize("one", CALLS)
def test_fake_agrees_with_meta_kernel(one: Call) -> None:
    """The same dtypes and sizes, with m symbolic and with m known."""
    ours, _ = ask_symbolic(one, "cpu", npu_op(one.overload).fake)
    theirs, _ = ask_symbolic(one, "npu")
    assert ours == theirs


def test_a_mismatch_is_seen() -> None:
    """The comparison fails for a fake of another op."""
    one = call("npu_rms_norm", "float16[m, 64]", "float16[64]")
    other = npu_op(call("npu_swiglu", "float16[m, 64]").overload).fake
    wrong, _ = ask_symbolic(call("npu_swiglu", "float16[m, 64]"), "cpu", other)
    assert wrong != ask_symbolic(one, "npu")[0]
