"""CANN's operator tables for 910B as a judge: has each right call an operator, and no wrong one?"""

from __future__ import annotations

import pytest

from conformance.right_calls import all_calls
from panguq.kernels.ascend.vendor.contracts import violations
from panguq.kernels.ascend.vendor.operators import OPERATORS_910B, unlisted


def test_right_calls_have_an_operator() -> None:
    """The check stands in `violations`, which a compile asks of every call that it writes."""
    seen = set()
    for name, one in all_calls():
        args, kwargs = one.with_tensors("meta", 24)
        assert violations(one.overload, args, kwargs) == [], name
        seen.add(one.op)
    assert len(seen & set(OPERATORS_910B)) > 5


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float64", "uint8"])
@pytest.mark.parametrize("op", OPERATORS_910B)
def test_no_operator_takes_what_910b_does_not_know(op: str, dtype: str) -> None:
    assert unlisted(op, dict.fromkeys(OPERATORS_910B[op].operands, dtype)) is not None
