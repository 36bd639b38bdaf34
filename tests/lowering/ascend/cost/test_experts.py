"""What experts cost, by hand, and how rows fall to experts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.experts_cost import extreme_rows
from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.cost.experts import grouped_cost, typical_rows
from panguq.lowering.ascend.op_times.call import VendorCall
from panguq.lowering.ascend.op_times.price import constants_of, price
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.targets import find_target

B2 = find_target("ascend910b2")  # 24 cores, 1800 MHz, 1600 GB/s


def problem(n: int, k: int, scheme: str) -> MatmulProblem:
    return MatmulProblem(None, n, k, SCHEMES[scheme], dtype="bfloat16")


def total(rows: list[int], scheme: str = "W8A8_DYNAMIC") -> float:
    return grouped_cost(rows, problem(1536, 2048, scheme), B2).total_us


def test_one_expert_with_one_block_by_hand() -> None:
    """16 rows of 512 inputs to 64 outputs in bfloat16: blocks of 16 x 32, on a core each."""
    found, c = grouped_cost([16], problem(64, 512, "FLOAT"), B2), constants_of("grouped_matmul", B2)
    memory = (16 * 512 + 512 * 64 + 16 * 64) * 2 / c["l2_gb_per_s"] / 1000
    loading = 512 * (16 + 32) * 2 / c["load_bytes_per_cycle"] / 1800
    assert found.terms["memory"] == pytest.approx(memory)
    assert found.terms["cube"] == pytest.approx(loading)  # 32 x 2 blocks of the cube take less
    assert found.total_us == pytest.approx(c["start_us"] + memory + c["exposed"] * loading)


def test_the_choice_and_tables_of_calls_have_one_price() -> None:
    rows = {"group_list": [32, 64], "split_item": 0}
    call = VendorCall("grouped_matmul", ((64, 256), (2, 256, 512)), ("bfloat16",) * 2, rows)
    assert grouped_cost([32, 32], problem(512, 256, "FLOAT"), B2) == price(call, B2)


def test_weights_of_experts_without_rows_are_not_read() -> None:
    few, many = (grouped_cost(r, problem(1536, 2048, "W8A8"), B2) for r in ([8, 0], [4, 4]))
    assert many.terms["memory"] > 1.9 * few.terms["memory"]


def test_weight_only_writes_and_reads_floats() -> None:
    found = grouped_cost([1], problem(1536, 2048, "W4A16"), B2)
    rate = constants_of("grouped_matmul", B2)["memory_gb_per_s"] * 1000
    assert found.terms["dequantize"] == pytest.approx(2 * 2 * 1536 * 2048 / rate)


@given(tokens=st.integers(1, 600), experts=st.integers(1, 130), top_k=st.integers(1, 8))
def test_rows_of_all_kinds_are_as_many_as_there_are(tokens: int, experts: int, top_k: int) -> None:
    top_k = min(top_k, experts)
    for rows in (typical_rows(tokens, top_k, experts), *extreme_rows(tokens, top_k, experts)):
        assert len(rows) == experts
        assert sum(rows) == tokens * top_k
        assert 0 <= min(rows) <= max(rows) <= tokens
        assert rows == sorted(rows, reverse=True)


def test_typical_rows_are_binomial() -> None:
    """64 tokens, 8 of 128 experts: 4 rows an expert on average, of standard deviation 1.94."""
    rows = typical_rows(64, 8, 128)
    deviation = (sum((r - 4) ** 2 for r in rows) / 128) ** 0.5
    assert deviation == pytest.approx(1.94, rel=0.05)
    # Of the 128 experts 64 tokens miss 128 * (1 - 1/16)^64 = 2.1.
    assert rows.count(0) == 2


@pytest.mark.parametrize("scheme", ["FLOAT", "W8A8_DYNAMIC", "W4A16", "W4A8"])
def test_more_rows_cost_more(scheme: str) -> None:
    times = [total(typical_rows(tokens, 8, 128), scheme) for tokens in (1, 4, 16, 64, 256, 1024)]
    assert times == sorted(times)
