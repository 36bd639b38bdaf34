"""The cost's terms by hand, for arrays and as expressions; and what published timings say of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bench.timings import (
    fit,
    fit_vendor_dequantize,
    left_out,
    tuned_schedules,
    w4a16_timings,
    w8a8_timings,
)
from panguq.errors import LoweringError
from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.candidates import ascend_candidates
from panguq.lowering.ascend.cost.executions import Execution, executions, own_execution
from panguq.lowering.ascend.cost.model import at, cost, execution_cost, total_us
from panguq.lowering.ascend.cost.terms import (
    ARGUMENTS,
    OVERLAPPED,
    SERIAL,
    TERMS,
    Form,
    S,
    terms,
    total,
)
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.targets import find_target

B1, B3 = find_target("ascend910b1"), find_target("ascend910b3")
TILE = (128, 256, 512)
ALL_FORMS = [
    Form("tiles", "kn", True),
    Form("tiles", "kn", True, adding="last program"),
    Form("tiles", "nk", False),
    Form("tiles", "kn", True, dequantize="ring"),
    Form("tiles", "kn", True, adding="all cores", dequantize="workspace"),
    Form("rectangles", "kn", True),
    Form("rectangles", "blocked", True),
    Form("rectangles", "nk", False),
    Form("rectangles", "kn", True, dequantize="vendor"),
]


def own(schedule: str, splits: int, tile=TILE, family: str = "w8a8") -> Candidate:
    storage = "int8" if family == "w8a8" else "int4"
    return Candidate(f"{family}_{schedule}", None, schedule, splits, tile, storage)


def problem(m: int | None, n: int, k: int, scheme: str = "W8A8", **options) -> MatmulProblem:
    return MatmulProblem(m, n, k, SCHEMES[scheme], **options)


# --- terms by hand ------------------------------------------------------------------------------


def test_w8a8_data_parallel_by_hand() -> None:
    """One tile on one of 20 cores at 1800 MHz; 32 steps of 512 along k."""
    found = cost(own("data_parallel", 1), problem(128, 256, 16384), B3).terms
    assert found["cube"] == pytest.approx(32 * 8 * 16 * 16 / 1800)
    # 128 rows of 512 bytes; 512 rows of 256 bytes, each as dear as 512.
    loaded = 32 * (128 * 512 + 512 * 512)
    assert found["core_load"] == pytest.approx(loaded / (93.9 * 1800))
    stored = 256 * 16384 + 256 * 4 + 128 * 16384 + 128 * 256 * 2
    assert found["hbm"] == pytest.approx(stored / 0.882e6)
    assert found["l2"] == pytest.approx(loaded / (110 * 1800 * 20))
    assert found["launch"] == 13.25
    assert found["vector_start"] == pytest.approx(1 + 7 / 20)
    assert found["store"] == pytest.approx(128 * 256 * 4 / (86 * 1800))
    for name in ("reduce", "dequantize", "vector_traffic", "dequantize_phase"):
        assert found[name] == 0


def test_w8a8_split_k_by_hand() -> None:
    found = cost(own("split_k", 16), problem(128, 256, 16384), B3).terms
    assert found["cube"] == pytest.approx(2 * 8 * 16 * 16 / 1800)
    assert found["launch"] == 13.25
    assert found["vector_start"] == pytest.approx(1 + 7 * 16 / 20)
    # One tile: one vector core of the last program reads and adds all of its partial sums.
    partial_sums = 16 * 128 * 256
    reading = partial_sums * 4 / (64 * 1800)
    adding = partial_sums / (64 * 1800)
    assert found["reduce"] == pytest.approx(3143 / 1800 + reading + adding)


def test_partial_sums_are_added_on_one_core_a_tile_or_on_all() -> None:
    given, split = problem(128, 1024, 16384), own("split_k", 4)  # four tiles
    last = cost(split, given, B3).terms["reduce"]
    one_tile = cost(split, problem(128, 256, 16384), B3).terms["reduce"]
    assert last == one_tile  # four cores add at once
    everyone = execution_cost(own_execution(split, given, B3, all_add=True), given, B3)
    assert everyone.terms["reduce"] == pytest.approx((last - 3143 / 1800) * 4 / 40)


def test_w4a16_by_hand() -> None:
    """4 tiles, 64 steps of 64 along k; two vector cores unpack a tile, and scale its sums."""
    candidate = own("data_parallel", 1, (16, 128, 64), "w4a16")
    found = cost(candidate, problem(1, 512, 4096, "W4A16"), B1).terms
    weights = 64 * 64 * 128  # of one tile
    sums = 16 / 64  # for each weight, of which 2 instructions multiply and 2 add a vector
    unpack = {"float16": 2.5, "bfloat16": 5.5}[problem(1, 512, 4096, "W4A16").dtype]
    assert found["dequantize"] == pytest.approx(weights * (unpack + 4 * sums) / (2 * 128 * 1850))
    codes = 64 * 64 * 512  # rows of 64 bytes, each as dear as 512
    moved = codes + weights * (2 / 128) + weights * 2 + weights * 4 * sums
    assert found["vector_traffic"] == pytest.approx(moved / (2 * 64 * 1850))
    split = cost(own("split_k", 4, (16, 128, 64), "w4a16"), problem(1, 512, 4096, "W4A16"), B1)
    # A quarter of k, on one vector core.
    assert split.terms["dequantize"] == pytest.approx(found["dequantize"] / 4 * 2)
    loaded = 64 * (1 * 512) + weights * 2  # one row of x; float16 weights without gaps
    assert found["core_load"] == pytest.approx(loaded / (93.9 * 1850))


def test_more_tiles_than_cores_run_in_waves() -> None:
    cubes = [
        cost(own("data_parallel", 1), problem(128, 256 * tiles, 4096), B3).terms["cube"]
        for tiles in (1, 20, 21, 40, 41)
    ]
    assert cubes == pytest.approx([cubes[0] * waves for waves in (1, 1, 2, 2, 3)])


def test_the_workspace_leaves_l2_when_it_is_too_large() -> None:
    candidate = own("data_parallel", 1, TILE, "w4a16")

    def found(n: int) -> dict[str, float]:
        given = problem(64, n, 4096, "W4A16")
        execution = own_execution(candidate, given, B1, dequantize="workspace")
        return execution_cost(execution, given, B1).terms

    fits, spills = found(16384), found(65536)  # 128 MiB and 512 MiB of float16, in 192 MiB of L2
    # The second phase fetches what L2 could not keep; if all fits, only inputs and outputs.
    assert fits["hbm"] == pytest.approx((64 * 4096 * 2 + 64 * 16384 * 2) / 1.6e6)
    assert spills["hbm"] > (320 << 20) / 1.6e6
    assert spills["dequantize_phase"] > 4 * fits["dequantize_phase"]


def test_cann_takes_another_kernel_for_few_tokens() -> None:
    vendor = Candidate("npu_weight_quant_batchmatmul", storage="int4")
    hows = [cost(vendor, problem(m, 4096, 4096, "W4A16"), B1).how for m in (1, 16, 17, 512)]
    assert [how.partition(",")[0] for how in hows] == ["msd", "msd", "dequantize", "dequantize"]
    nz = [problem(m, 4096, 4096, "W8A16", weight_format="NZ") for m in (64, 65, 256, 257)]
    hows = [cost(replace(vendor, storage="int8"), given, B1).how for given in nz]
    kernels = [how.partition(",")[0] for how in hows]
    assert kernels == ["msd", "nz_split_k", "nz_split_k", "dequantize"]


def test_a_cost_needs_a_number_of_tokens() -> None:
    with pytest.raises(LoweringError, match="m is symbolic"):
        cost(own("data_parallel", 1), problem(None, 256, 512), B1)


# --- one formula, three ways --------------------------------------------------------------------


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_terms_and_total_are_expressions_in_known_symbols(form) -> None:
    parts = terms(form)
    assert tuple(parts) == TERMS and set(TERMS) == {*SERIAL, *OVERLAPPED}
    known = {S[name] for name in ARGUMENTS}
    assert total(form).free_symbols <= known
    values = {symbol: sympy.Integer(3 + i) for i, symbol in enumerate(sorted(known, key=str))}
    numbers = {name: float(term.xreplace(values)) for name, term in parts.items()}
    serial = sum(numbers[name] for name in SERIAL)
    expected = serial + max(numbers[name] for name in OVERLAPPED)
    assert float(total(form).xreplace(values)) == pytest.approx(expected)


SIZES = st.tuples(
    st.integers(1, 600),
    st.integers(1, 80).map(lambda n: 64 * n),
    st.sampled_from([512, 4096, 12800]),
)
KINDS = st.sampled_from(["W8A8", "W8A16", "W4A16", "FLOAT"])


def exact_total(execution: Execution, given: MatmulProblem, m: int) -> float:
    """The sum of the terms in exact rational numbers, by sympy."""
    numbers = {
        S[name]: sympy.Rational(str(execution.argument(name, given, B1))) for name in ARGUMENTS[1:]
    }
    return float(total(execution.form).xreplace({**numbers, S["m"]: sympy.Integer(m)}))


@settings(max_examples=25, deadline=None)
@given(SIZES, KINDS, st.data())
def test_expression_numbers_and_arrays_agree(sizes, scheme, data) -> None:
    m, n, k = sizes
    given = problem(m, n, k, scheme)
    legal = [c for c in ascend_candidates(given, B1) if c.refusal is None]
    candidate = data.draw(st.sampled_from(legal))
    found = cost(candidate, given, B1)
    named = [e for e in executions(candidate, given, B1) if e.label == found.how]
    exact = min(exact_total(e, given, m) for e in named)
    assert found.total_us == pytest.approx(exact)
    array = total_us([candidate], given, B1, np.array([m, m + 1]))
    assert array[0, 0] == pytest.approx(found.total_us)
    serial = sum(found.terms[name] for name in SERIAL)
    assert found.total_us == pytest.approx(serial + max(found.terms[n] for n in OVERLAPPED))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5000), k=st.integers(1, 60).map(lambda k: 128 * k), scheme=KINDS)
def test_own_kernels_never_cost_less_for_more_tokens(n, k, scheme) -> None:
    """What `envelope.survivors` relies on."""
    legal = [c for c in ascend_candidates(problem(None, 8 * n, k, scheme), B3) if not c.refusal]
    steady = [c for c in legal if c.schedule != "vendor"]
    assume(steady)
    costs = total_us(steady, problem(None, 8 * n, k, scheme), B3, np.arange(1, 700))
    assert (np.diff(costs, axis=1) >= -1e-9).all()


# --- what is published --------------------------------------------------------------------------


def test_left_out_w8a8_timings_are_predicted_within_15_percent() -> None:
    timings = w8a8_timings()
    for timing in timings:
        for shape in (False, True):
            us = left_out(timing, timings, B3, shape).total_us
            assert abs(us / timing.us - 1) < 0.15, timing


def test_the_faster_schedule_is_predicted_from_the_other_shapes() -> None:
    timings = w8a8_timings()
    for whole, split in zip(timings[::2], timings[1::2], strict=True):
        assert whole.shape == split.shape and whole.splits == 1 < split.splits
        predicted = [left_out(t, timings, B3, True).total_us for t in (whole, split)]
        assert (predicted[0] < predicted[1]) == (whole.us < split.us)


def test_no_constant_is_fixed_by_one_timing_alone() -> None:
    """Without any one of them, both constants are still determined, and much the same."""
    timings = w8a8_timings()
    full = fit(timings, B3)
    for timing in timings:
        part = fit([t for t in timings if t != timing], B3)
        assert part.launch_us == pytest.approx(full.launch_us, rel=0.1)
        rates = (part.core_load_bytes_per_cycle, full.core_load_bytes_per_cycle)
        assert rates[0] == pytest.approx(rates[1], rel=0.1)


def test_the_targets_have_the_fitted_constants() -> None:
    found = fit(w8a8_timings(), B3)
    assert B3["launch_us"] == pytest.approx(found.launch_us, rel=2e-3)
    rate = B3["core_load_bytes_per_cycle"]
    assert rate == pytest.approx(found.core_load_bytes_per_cycle, rel=2e-3)
    vendor = fit_vendor_dequantize(w4a16_timings(), B1)
    assert B1["vendor_dequantize_bytes_per_cycle"] == pytest.approx(vendor, rel=2e-3)


def test_tuned_tilings_that_keep_k_whole_come_out_data_parallel() -> None:
    found = [t for t in tuned_schedules("NZ") if t.schedule == "data_parallel"]
    assert len(found) == 37
    assert [t for t in found if t.predicted != "data_parallel"] == []
    assert any(t.problem.dtype == "float32" and t.problem.m == 160 for t in found)


def test_at_fixes_the_number_of_tokens() -> None:
    assert at(problem(None, 8, 8), 5).m == 5
