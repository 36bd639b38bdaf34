"""The selector is the argmin of the cost over what is legal, by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from panguq.errors import LoweringError
from panguq.ir.number_format import INT4, INT8
from panguq.ir.quant_spec import SCHEMES, QuantSpec, Scheme
from panguq.lowering.choice import DECODE_M, DECODE_STEPS, PREFILL_M
from panguq.lowering.cpu.calls import _LOWERINGS
from panguq.lowering.cpu.candidates import cpu_candidates
from panguq.lowering.cpu.cost import (
    BYTES,
    CONVERTED,
    MANY_TOKENS,
    M,
    cost_us,
    cpu_cost_name,
    crossover_m,
)
from panguq.lowering.cpu.target import CPU, CpuTarget
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.select_kernel import select_kernel
from panguq.lowering.target import KernelCost, Target

PROBLEMS = st.builds(
    MatmulProblem,
    m=st.none(),
    n=st.integers(1, 4096),
    k=st.integers(1, 128).map(lambda k: 32 * k) | st.sampled_from([2, 33, 50, 100, 576]),
    scheme=st.sampled_from(
        [s for s in SCHEMES.values() if s.weight and all(map(CPU.reads, s.formats))]
    ),
    precision=st.sampled_from(["bfloat16", "float32"]),
)


def servable(problem: MatmulProblem) -> bool:
    try:
        return problem.group_size > 0
    except ValueError:
        return False


PROBLEMS = PROBLEMS.filter(servable)


def microseconds(constants: KernelCost, problem: MatmulProblem, m: int) -> float:
    """The cost formula once more, in plain arithmetic."""
    weights = problem.n * problem.k
    read = weights * constants.weight_bytes_per_weight / constants.gb_per_s / 1000
    return constants.launch_us + read + m * weights / constants.gmac_per_s / 1000


def cheapest(kernel: str, problem: MatmulProblem, m: int, target: Target) -> float:
    variants = [kernel, *(many for few, many in MANY_TOKENS.items() if few == kernel)]
    return min(microseconds(target.kernels[v], problem, m) for v in variants)


def mixed(kernel: str, problem: MatmulProblem, target: Target) -> float:
    decode, prefill = (cheapest(kernel, problem, m, target) for m in (DECODE_M, PREFILL_M))
    return DECODE_STEPS * decode + prefill


@given(PROBLEMS)
def test_the_choice_is_the_argmin_of_what_is_legal(problem) -> None:
    legal = [c.kernel for c in cpu_candidates(problem) if c.refusal is None]
    costs = {kernel: mixed(kernel, problem, CPU) for kernel in legal}
    choice = select_kernel(problem, CPU)
    assert costs[choice.kernel] == pytest.approx(min(costs.values()))
    assert choice.kernel in _LOWERINGS
    assert choice.decode_us == pytest.approx(cheapest(choice.kernel, problem, DECODE_M, CPU))
    assert choice.prefill_us == pytest.approx(cheapest(choice.kernel, problem, PREFILL_M, CPU))


@given(
    problem=PROBLEMS,
    constants=st.lists(st.floats(0.01, 100.0), min_size=24, max_size=24),
)
def test_a_wrong_cost_never_chooses_what_is_illegal(problem, constants) -> None:
    """Whatever the numbers, the choice is legal and cheapest under them."""
    rows = [constants[i : i + 4] for i in range(0, 24, 4)]
    kernels = {name: KernelCost(*row) for name, row in zip(CPU.kernels, rows, strict=True)}
    target = CpuTarget("made up", kernels)
    legal = [c.kernel for c in cpu_candidates(problem) if c.refusal is None]
    choice = select_kernel(problem, target)
    assert choice.kernel in legal
    best = min(mixed(kernel, problem, target) for kernel in legal)
    assert mixed(choice.kernel, problem, target) == pytest.approx(best)


@given(PROBLEMS)
def test_every_loser_is_kept_with_its_cost_or_its_refusal(problem) -> None:
    choice = select_kernel(problem, CPU)
    refusals = {c.kernel: c.refusal for c in cpu_candidates(problem)}
    losers = dict(choice.losers)
    assert set(losers) == set(refusals) - {choice.kernel}
    for kernel, why in losers.items():
        if refusals[kernel] is not None:
            assert why == refusals[kernel]
        else:
            decode = cheapest(kernel, problem, DECODE_M, CPU)
            assert why.startswith(f"{decode:.0f} us at m=1, ")


@given(PROBLEMS)
def test_the_crossover_is_where_the_costs_cross(problem) -> None:
    at = crossover_m(BYTES, CONVERTED, problem, CPU)

    def difference(m: int) -> float:
        first, second = (microseconds(CPU.kernels[k], problem, m) for k in (BYTES, CONVERTED))
        return first - second

    assert at == 0 or difference(at) <= 1e-6
    assert at == 2**31 - 1 or difference(at + 1) >= -1e-6


def test_a_variant_that_is_always_or_never_cheaper() -> None:
    problem = MatmulProblem(None, 64, 64, SCHEMES["W8A16"])
    fast, slow = KernelCost(1, 10, 100, 1), KernelCost(2, 10, 50, 1)
    target = CpuTarget("made up", {"fast": fast, "slow": slow, "late": KernelCost(2, 10, 200, 1)})
    assert crossover_m("fast", "slow", problem, target) == 2**31 - 1
    assert crossover_m("slow", "fast", problem, target) == 0
    late = crossover_m("fast", "late", problem, target)
    assert 0 < late < 2**31 - 1


def test_costs_are_expressions_in_m() -> None:
    problem = MatmulProblem(None, 64, 64, SCHEMES["W8A8"])
    expression = cost_us("int8_linear", problem, CPU)
    assert expression.free_symbols == {M}
    fixed = cost_us("int8_linear", MatmulProblem(7, 64, 64, SCHEMES["W8A8"]), CPU)
    assert float(fixed) == pytest.approx(float(expression.subs(M, 7)))


def test_weight_only_kernels_switch_by_m_and_integer_ones_do_not() -> None:
    choose = lambda scheme: select_kernel(MatmulProblem(None, 512, 576, SCHEMES[scheme]), CPU)  # noqa: E731
    assert all(choose(s).few_tokens > 0 for s in ("W8A16", "W4A16", "W4A16_ASYM"))
    assert [choose(s).few_tokens for s in ("W8A8", "W8A8_DYNAMIC")] == [0, 0]


@given(problem=PROBLEMS, m=st.integers(1, 2000))
def test_what_runs_for_m_tokens_is_the_cheapest_of_what_the_op_can_do(problem, m) -> None:
    choice = select_kernel(problem, CPU)
    runs = cpu_cost_name(choice.kernel, choice.few_tokens, m)
    found = microseconds(CPU.kernels[runs], problem, m)
    assert found == pytest.approx(cheapest(choice.kernel, problem, m, CPU))


def test_a_layout_that_would_never_be_read_is_not_made() -> None:
    slow = {**CPU.kernels, "int4_linear": KernelCost(1e6, 1, 1, 0.5)}
    problem = MatmulProblem(None, 512, 576, SCHEMES["W4A16"])
    choice = select_kernel(problem, CpuTarget("made up", slow))
    assert (choice.kernel, choice.few_tokens) == ("dequantized_linear", 0)


@pytest.mark.parametrize(
    ("scheme", "n", "k", "kernel", "reason"),
    [
        ("W8A8", 8, 1, "int8_linear", "single input column"),
        ("W8A8", 8, 70000, "int8_linear", "int32"),
        ("W8A16", 8, 50, "int8_weight_linear", "not a multiple of 16"),
        ("W4A16", 8, 128, "int4_linear", "n=8 is not a multiple of 16"),
    ],
)
def test_refusals_say_why(scheme, n, k, kernel, reason) -> None:
    found = {
        c.kernel: c.refusal for c in cpu_candidates(MatmulProblem(None, n, k, SCHEMES[scheme]))
    }
    assert reason in found[kernel]


def test_nothing_legal_is_an_error_with_every_reason() -> None:
    with pytest.raises(LoweringError) as caught:
        select_kernel(MatmulProblem(None, 8, 1, SCHEMES["W8A8"]), CPU)
    assert "no kernel of target cpu can run W8A8 for n=8, k=1" in caught.value.message
    assert "int8_linear: k=1" in caught.value.message
    assert "another scheme" in caught.value.hint


def test_every_candidate_has_a_cost_and_a_lowering() -> None:
    """Or the first shape that prefers it would fail."""
    four, token = QuantSpec(INT4, "per_group", group_size=32), QuantSpec(INT8, "per_token")
    for scheme in (*SCHEMES.values(), Scheme("W4A8", four, token)):
        for candidate in cpu_candidates(MatmulProblem(None, 64, 64, scheme)):
            if candidate.kernel != "none":
                assert candidate.kernel in CPU.kernels
                assert scheme.is_float or candidate.kernel in _LOWERINGS
