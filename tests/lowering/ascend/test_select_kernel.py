"""On Ascend targets: the table over m is the argmin for every m, by brute force; and what a wrong
cost may change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from panguq.errors import LoweringError
from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend import select as selection
from panguq.lowering.ascend.candidates import ascend_candidates
from panguq.lowering.ascend.cost.envelope import ranges, survivors
from panguq.lowering.ascend.cost.model import at, cost, total_us
from panguq.lowering.ascend.dispatch import Operands, kernel_call
from panguq.lowering.ascend.machine import ASCEND_UNITS
from panguq.lowering.ascend.target import AscendTarget
from panguq.lowering.choice import HYSTERESIS, Choice, TokenMix
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.select_kernel import scheme_refusal, select_kernel
from panguq.lowering.target import Constant, Target
from panguq.lowering.targets import find_target

B1 = find_target("ascend910b1")
COUNTS = ("cube_cores", "vector_cores", "vector_lanes")
INT4_STORAGES = ("int4", "int4_quarters")
QUANTIZED = ("W8A8", "W8A8_DYNAMIC", "W8A16", "W4A16")
LAST = 300  # the tests' largest m: brute force looks at every one


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(selection, "LARGEST_M", LAST)


def changed(target: Target, **factors: float) -> Target:
    """The target with constants multiplied; counts stay whole and above zero."""
    constants = dict(target.constants)
    for name, factor in factors.items():
        value = constants[name].value * factor
        value = max(1, round(value)) if name in COUNTS else value
        constants[name] = Constant(value, ASCEND_UNITS[name], "changed by a test")
    return AscendTarget("changed", constants=constants)


TARGETS = st.dictionaries(
    st.sampled_from(sorted(ASCEND_UNITS)), st.floats(0.05, 20.0), max_size=6
).map(lambda factors: changed(B1, **factors))
PROBLEMS = st.builds(
    MatmulProblem,
    m=st.none(),
    n=st.integers(1, 90).map(lambda n: 64 * n),
    k=st.integers(2, 60).map(lambda k: 128 * k),
    scheme=st.sampled_from([SCHEMES[name] for name in QUANTIZED]),
    dtype=st.sampled_from(["bfloat16", "float16"]),
)


def legal(problem: MatmulProblem, target: Target, allow_float: bool = False) -> list[Candidate]:
    return [c for c in ascend_candidates(problem, target, allow_float) if c.refusal is None]


def entry(choice: Choice, m: int) -> Candidate:
    return next(e.candidate for e in choice.table if e.last_m is None or m <= e.last_m)


# --- the argmin ---------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(problem=PROBLEMS, target=TARGETS, hysteresis=st.sampled_from([0.0, 0.05, 0.5]))
def test_the_table_is_the_argmin_for_every_m(problem, target, hysteresis) -> None:
    choice = select_kernel(problem, target, hysteresis=hysteresis)
    tokens = np.arange(1, LAST + 1)
    found = [c for c in legal(problem, target) if c.storage == choice.storage]
    costs = total_us(found, problem, target, tokens)
    chosen = [costs[found.index(entry(choice, m)), m - 1] for m in tokens]
    assert (np.array(chosen) <= (1 + hysteresis) * costs.min(axis=0)).all()
    firsts = [e.first_m for e in choice.table]
    lasts = [e.last_m for e in choice.table]
    assert firsts[0] == 1 and lasts[-1] is None
    assert firsts[1:] == [last + 1 for last in lasts[:-1]]


@settings(max_examples=25, deadline=None)
@given(problem=PROBLEMS, target=TARGETS, m=st.integers(1, 5000), allow_float=st.booleans())
def test_a_fixed_m_gets_the_argmin(problem, target, m, allow_float) -> None:
    given = at(problem, m)
    choice = select_kernel(given, target, allow_float=allow_float)
    costs = [cost(c, given, target).total_us for c in legal(given, target, allow_float)]
    assert choice.decode_us == pytest.approx(min(costs))
    assert [(e.first_m, e.last_m) for e in choice.table] == [(m, m)]


@settings(max_examples=20, deadline=None)
@given(
    problem=PROBLEMS,
    target=TARGETS,
    decode=st.lists(st.integers(1, 64), min_size=1, max_size=3),
    prefill=st.lists(st.integers(65, 4096), min_size=1, max_size=3),
    weights=st.tuples(st.floats(0.1, 500), st.floats(0.1, 500)),
)
def test_storage_is_the_argmin_over_the_mix(problem, target, decode, prefill, weights) -> None:
    mix = TokenMix(tuple(decode), tuple(prefill), *weights)
    choice = select_kernel(problem, target, mix, allow_float=True)
    found = legal(problem, target, allow_float=True)

    def mean(storage: str, tokens: list[int]) -> float:
        same = [c for c in found if c.storage == storage]
        cheapest = [min(cost(c, at(problem, m), target).total_us for c in same[:1]) for m in tokens]
        return sum(cheapest) / len(tokens)

    storages = {c.storage for c in found}
    assert dict(choice.storage_us).keys() == storages
    assert choice.storage == min(choice.storage_us, key=lambda pair: pair[1])[0]
    float_us = weights[0] * mean("float", decode) + weights[1] * mean("float", prefill)
    assert dict(choice.storage_us)["float"] == pytest.approx(float_us)
    assert all(e.candidate.storage == choice.storage for e in choice.table)


def test_float_wins_only_if_allowed() -> None:
    """W8A16 of a small matmul costs more than float16: vector cores start, CANN dequantizes."""
    problem = MatmulProblem(None, 1536, 6144, SCHEMES["W8A16"])
    assert select_kernel(problem, B1).storage == "int8"
    allowed = select_kernel(problem, B1, allow_float=True)
    assert allowed.storage == "float" and allowed.kernel == "linear"
    assert "npu_weight_quant_batchmatmul" in dict(allowed.losers)


def test_float_schemes_need_no_permission() -> None:
    choice = select_kernel(MatmulProblem(None, 512, 512, SCHEMES["FLOAT"]), B1)
    assert [str(e.candidate) for e in choice.table] == ["linear"]


def test_losers_are_kept_with_cost_or_refusal() -> None:
    losers = dict(select_kernel(MatmulProblem(None, 4096, 1024, SCHEMES["W8A8"]), B1).losers)
    assert losers["linear"] == "the scheme is W8A8, and allow_float is off"
    assert losers["w8a8_split_k"].endswith("us at m=512")
    assert " us at m=1, " in losers["w8a8_split_k"]


def test_a_deep_matmul_with_few_outputs_is_split() -> None:
    b3 = find_target("ascend910b3")
    choice = select_kernel(MatmulProblem(128, 256, 16384, SCHEMES["W8A8"]), b3)
    assert choice.table[0].candidate.schedule == "split_k"
    wide = select_kernel(MatmulProblem(128, 16384, 256, SCHEMES["W8A8"]), b3)
    assert wide.table[0].candidate.schedule != "split_k"


# --- what a wrong cost may change ---------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("constant", sorted(ASCEND_UNITS))
def test_a_cost_ten_times_off_changes_no_width_and_takes_nothing_illegal(constant, factor) -> None:
    """It may change which of two layouts of 4-bit weights is stored."""
    target = changed(B1, **{constant: factor})
    for name in QUANTIZED:
        for n, k in ((1024, 4096), (4096, 12800)):
            problem = MatmulProblem(None, n, k, SCHEMES[name])
            choice = select_kernel(problem, target)
            assert choice.storage in (INT4_STORAGES if name == "W4A16" else ("int8",))
            taken = {e.candidate for e in choice.table}
            assert taken <= set(legal(problem, target))
            assert {c.storage for c in taken} == {choice.storage}
            assert scheme_refusal(problem, target) is None


def test_whatever_w8a8_kernel_a_wrong_cost_takes_the_bits_are_the_same() -> None:
    n, k, m = 512, 2048, 7
    problem = MatmulProblem(None, n, k, SCHEMES["W8A8_DYNAMIC"])
    taken: set[Candidate] = set()
    for constant in sorted(ASCEND_UNITS):
        for factor in (0.1, 10.0):
            choice = select_kernel(problem, changed(B1, **{constant: factor}), hysteresis=0.0)
            taken |= {e.candidate for e in choice.table}
    assert {c.schedule for c in taken} >= {"vendor", "split_k"}
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(-127, 128, s, generator=generator) for s in ((m, k), (k, n))]
    x, weight = (c.to(torch.int8) for c in codes)
    scale = torch.rand(n, generator=generator) / 100
    pertoken = torch.rand(m, generator=generator)
    given = Operands(x, weight, scale, None, pertoken, None, 0, torch.bfloat16)
    results = []
    for candidate in taken:
        op, args, named = kernel_call(candidate, given)
        results.append(op(*args, **named))
    assert all(torch.equal(result, results[0]) for result in results)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 8), (-1, 8, 8), (None, 0, 8), (1, 8, 0)])
def test_sizes_start_at_one(m, n, k) -> None:
    for target in (B1, find_target("cpu")):
        with pytest.raises(LoweringError, match="sizes start at 1"):
            select_kernel(MatmulProblem(m, n, k, SCHEMES["W8A8"]), target)


def test_a_scheme_that_no_kernel_can_run_names_every_reason() -> None:
    problem = MatmulProblem(None, 65536, 4096, SCHEMES["W8A16"])
    with pytest.raises(LoweringError) as caught:
        select_kernel(problem, B1)
    assert "no kernel of target ascend910b1 can run W8A16 for n=65536" in caught.value.message
    assert "n=65536 is more than 65535" in caught.value.message
    assert "another scheme" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": (0,)}, "decode"),
        ({"prefill": (1.5,)}, "prefill"),
        ({"decode_weight": -1.0}, "decode_weight"),
        ({"prefill_weight": float("nan")}, "prefill_weight"),
        ({"decode": ()}, "there are no tokens"),
        ({"decode_weight": 0.0, "prefill_weight": 0.0}, "both weights are zero"),
    ],
)
def test_a_mix_that_cannot_be(options, message) -> None:
    with pytest.raises(LoweringError, match=f"token mix: .*{message}"):
        TokenMix(**options)


def test_the_weights_of_a_mix() -> None:
    mix = TokenMix((1, 3), (1, 512), decode_weight=4.0, prefill_weight=2.0)
    assert mix.weights() == {1: 3.0, 3: 2.0, 512: 1.0}
    assert TokenMix(decode=(), decode_weight=0.0).weights().keys() == {512, 1024, 2048, 4096}


# --- envelope -----------------------------------------------------------------------------------

COSTS = st.integers(1, 6).flatmap(
    lambda rows: st.lists(
        st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=rows, max_size=rows
    )
)


@given(COSTS, st.sampled_from([0.0, 0.2, 1.0]))
def test_ranges_cover_all_columns_within_the_tolerance(rows, tolerance) -> None:
    width = min(map(len, rows))
    costs = np.array([row[:width] for row in rows], dtype=float)
    found = ranges(costs, tolerance)
    assert [first for first, _, _ in found] == [0, *(last + 1 for _, last, _ in found[:-1])]
    assert found[-1][1] == width - 1
    for first, last, row in found:
        part = costs[:, first : last + 1]
        assert (part[row] <= (1 + tolerance) * part.min(axis=0)).all()
        if last + 1 < width:  # no row could have gone on
            longer = costs[:, first : last + 2]
            fits = (longer <= (1 + tolerance) * longer.min(axis=0)).all(axis=1)
            assert not fits.any()


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=200, max_size=200), min_size=1, max_size=5),
    st.integers(1, 200),
    st.sampled_from([0.0, 0.3]),
)
def test_no_survivor_is_missed(steps, last_m, tolerance) -> None:
    costs = 1.0 + np.cumsum(np.array(steps, dtype=float), axis=1)
    steady = list(range(1, len(steps)))
    costs[0] = costs[0][::-1]  # falls, as a vendor's cost may
    found = survivors(
        lambda rows, m: costs[list(rows)][:, m - 1], range(len(steps)), steady, last_m, tolerance
    )
    within = (costs <= (1 + tolerance) * costs.min(axis=0))[:, :last_m].any(axis=1)
    assert set(np.flatnonzero(within)) <= set(found)


def test_the_default_hysteresis_keeps_tables_short() -> None:
    for name in QUANTIZED:
        for n, k in ((4096, 4096), (12800, 4096), (4096, 12800), (1536, 6144)):
            choice = select_kernel(MatmulProblem(None, n, k, SCHEMES[name]), B1)
            assert len(choice.table) <= 6
            assert choice.hysteresis == HYSTERESIS
            exact = replace(choice, table=())
            assert exact.storage == choice.storage
