"""Learned rounding: each step is the best there is, and nothing ends worse than it began."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from panguq.errors import NumericsError, RecipeError
from panguq.ir.quant_spec import parse_scheme
from panguq.ir.run.interpret import run
from panguq.passes.codes.gram import gram, output_error
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.passes.gptq import Gptq
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.learned_rounding import Grid, LearnedRounding, descend, refit_scales
from panguq.passes.quantize_weights import QuantizeWeights
from tests.model_shelf import canonical, family_context, run_passes

NEAREST = LearnedRounding(start="nearest")


def problem(
    n: int = 6, k: int = 64, seed: int = 0, scheme: str = "W4A16-g32", tokens: int = 96
) -> WeightProblem:
    """A random weight and inputs whose channels are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    inputs = torch.randn(tokens, k, generator=generator) @ mix * torch.rand(k, generator=generator)
    spec = parse_scheme(scheme).weight
    assert spec is not None
    size = spec.group_size_for(k)
    return WeightProblem(("linear",), weight, spec, size, torch.float32, [inputs])


def errors(
    step: LearnedRounding | Gptq, given: WeightProblem, solution: Solution, damping: float = 1.0
) -> Tensor:
    """Every row's squared output error over the inputs, and its damping, `[n]`, float64."""
    difference = step.dequantize(given, solution).double() - given.weight.double()
    inputs = torch.cat(list(given.inputs)).double()
    damped = damping * (difference.square() * inputs.square().sum(0)).sum(1)
    return (inputs @ difference.T).square().sum(0) + damped


def nearest(given: WeightProblem) -> Solution:
    """Where the pass with `start: nearest` starts: rounded to nearest with searched clipping."""
    return NEAREST._start(given, gram(given.inputs))


def moments(given: WeightProblem) -> Tensor:
    return gram(given.inputs).float()


# --- against slow and obvious implementations ---------------------------------------------------


def slow_steps(grid: Grid, weight: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Try every code of every row one up and one down and keep the best, `steps` times."""
    levels, scale = grid.levels.clone(), grid.scale.float().repeat_interleave(grid.group_size, 1)
    zero = grid.zero_point.repeat_interleave(grid.group_size, 1)
    for _, row in itertools.product(range(steps), range(len(levels))):
        best = output_error((levels * scale - weight)[row : row + 1].double(), hessian).item()
        chosen = levels[row].clone()
        for column, by in itertools.product(range(levels.shape[1]), (-1, 1)):
            tried = levels[row].clone()
            tried[column] += by
            code = tried[column] + zero[row, column]
            if not grid.spec.quant_min <= code <= grid.spec.quant_max:
                continue
            error = output_error((tried * scale[row] - weight[row])[None].double(), hessian).item()
            if error < best:
                best, chosen = error, tried
        levels[row] = chosen
    return levels


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W2A16-g32", "W8A16"])
def test_the_first_steps_equal_those_of_a_slow_search(scheme: str) -> None:
    given = problem(n=3, k=32, scheme=scheme)
    grid = Grid.of(nearest(given), given)
    expected = slow_steps(grid, given.weight, gram(given.inputs), steps=4)
    found = descend(grid, given.weight, moments(given), limit=4)
    assert torch.equal(found.levels, expected)
    assert not torch.equal(found.levels, grid.levels)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scheme=st.sampled_from(["W4A16-g32", "W3A16-g32"]))
def test_no_single_step_is_left_that_helps(seed: int, scheme: str) -> None:
    given = problem(n=2, k=32, seed=seed, scheme=scheme)
    grid = descend(Grid.of(nearest(given), given), given.weight, moments(given), limit=512)
    hessian = gram(given.inputs)
    before = output_error(grid.values() - given.weight, hessian)
    once_more = grid._replace(levels=slow_steps(grid, given.weight, hessian, steps=1))
    after = output_error(once_more.values() - given.weight, hessian)
    assert (before - after <= 1e-5 * before).all()  # WORTH_A_STEP in float32


def brute_force(grid: Grid, weight: Tensor, hessian: Tensor) -> float:
    """The least error of a row over all codes that it may have."""
    codes = range(grid.spec.quant_min, grid.spec.quant_max + 1)
    every = torch.tensor(list(itertools.product(codes, repeat=weight.shape[1]))).float()
    values = (every - grid.zero_point) * grid.scale.float()
    return output_error(values.double() - weight.double(), hessian).min().item()


def test_tiny_rows_come_near_the_best_codes_of_all() -> None:
    """At 2 bits, 4^6 codes: mean errors above the least printed; most rows reach it."""
    rounded, started, learned, best = 0.0, 0.0, 0.0, 0.0
    reached = 0
    for seed in range(60):
        given = problem(n=1, k=6, seed=seed, scheme="W2A16-per_channel", tokens=16)
        hessian = gram(given.inputs)
        first = Gptq(damping=0.01).solve(given)
        grid = descend(Grid.of(first, given), given.weight, moments(given), limit=64)
        least = brute_force(grid, given.weight, hessian)
        found = output_error(grid.values() - given.weight, hessian).item()
        assert found >= least * (1 - 1e-6)
        rounded += errors(NEAREST, given, nearest(given), damping=0.0).item()
        started += errors(NEAREST, given, first, damping=0.0).item()
        learned, best = learned + found, best + least
        reached += found <= least * (1 + 1e-5)
    print(f"nearest {rounded / best - 1:+.1%}, GPTQ {started / best - 1:+.1%}, "
          f"learned {learned / best - 1:+.1%}, reached by {reached} of 60")  # fmt: skip
    assert reached > 30
    assert learned < started < rounded


def test_one_group_gets_the_scale_of_least_squares() -> None:
    given = problem(n=5, k=32, scheme="W8A16")
    hessian = gram(given.inputs)
    grid = Grid.of(nearest(given), given)
    found = refit_scales(grid, given.weight, hessian.float())
    levels, weight = grid.levels.double(), given.weight.double()
    expected = ((levels @ hessian) * weight).sum(1) / ((levels @ hessian) * levels).sum(1)
    assert torch.allclose(found.scale[:, 0].double(), expected, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W3A16-g32", "W2A16-sym-g32"])
def test_refitted_scales_are_storable_and_never_worse(scheme: str) -> None:
    given = problem(n=16, scheme=scheme)
    hessian = gram(given.inputs)
    grid = Grid.of(nearest(given), given)
    found = refit_scales(grid, given.weight, hessian.float())
    assert found.scale.dtype == torch.bfloat16
    assert (found.scale != grid.scale).any()
    assert (found.scale.sign() == grid.scale.sign()).all()
    before = output_error(grid.values() - given.weight, hessian)
    after = output_error(found.values() - given.weight, hessian)
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < before.sum()


# --- never worse --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scheme=st.sampled_from(["W8A16", "W6A16-g32", "W4A16-g32", "W3A16-g32", "W2A16-sym-g32"]),
    start=st.sampled_from(["gptq", "nearest"]),
)
def test_no_row_is_worse_than_its_start(seed: int, scheme: str, start: str) -> None:
    given = problem(seed=seed, scheme=scheme, tokens=20 + seed % 80)
    step = LearnedRounding(start=start)  # type: ignore[arg-type]
    first = Gptq().solve(given) if start == "gptq" else nearest(given)
    solution = step.solve(given)
    low, high = given.spec.quant_min, given.spec.quant_max
    assert solution.codes.dtype == torch.int8
    assert solution.codes.min() >= low and solution.codes.max() <= high
    assert solution.scale.dtype == first.scale.dtype
    before, after = errors(step, given, first), errors(step, given, solution)
    assert (after <= before * (1 + 1e-6)).all()


def test_it_beats_gptq_on_every_seed() -> None:
    ratios = []
    for seed in range(40):
        given = problem(seed=seed)
        gptq, learned = Gptq().solve(given), LearnedRounding().solve(given)
        ratios.append(errors(NEAREST, given, learned).sum() / errors(NEAREST, given, gptq).sum())
    assert (torch.stack(ratios) < 1).all()  # 0.88 to 0.96


def test_notes_are_errors_in_db_and_the_share_of_changed_codes() -> None:
    given = problem()
    solution = LearnedRounding().solve(given)
    first = Gptq().solve(given)
    before, after, changed = (float(note) for note in solution.notes)  # type: ignore[arg-type]
    signal = given.inputs[0].double() @ given.weight.double().T
    expected = 10 * torch.log10(
        errors(NEAREST, given, solution, damping=0.0).sum() / signal.square().sum()
    )
    assert after == pytest.approx(expected.item(), abs=0.01)
    start = 10 * torch.log10(
        errors(NEAREST, given, first, damping=0.0).sum() / signal.square().sum()
    )
    assert before == pytest.approx(start.item(), abs=0.01)
    assert changed == pytest.approx((solution.codes != first.codes).float().mean().item())


# --- degenerate input ---------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["gptq", "nearest"])
@pytest.mark.parametrize(
    "case", ["dead column", "constant row", "one token", "zero weight", "rank"]
)
def test_degenerate_inputs(case: str, start: str) -> None:
    given = problem(tokens=1 if case == "one token" else 96)
    inputs = given.inputs[0]
    if case == "dead column":
        inputs[:, 3] = 0
    elif case == "constant row":
        given.weight[2] = 0.7
    elif case == "zero weight":
        given.weight.zero_()
    elif case == "rank":
        inputs.copy_(inputs[:, :2] @ torch.randn(2, inputs.shape[1]))
    step = LearnedRounding(start=start)  # type: ignore[arg-type]
    first = step._start(given, gram(given.inputs))
    solution = step.solve(given)
    found = step.dequantize(given, solution)
    assert found.isfinite().all()
    assert (errors(step, given, solution) <= errors(step, given, first) * (1 + 1e-6)).all()
    if case == "dead column":  # nothing is learned about it
        assert torch.equal(solution.codes[:, 3], first.codes[:, 3])
    if case == "zero weight":
        assert not found.any()


def test_inputs_that_are_all_zero_change_nothing() -> None:
    given = problem()
    given.inputs[0].zero_()
    assert torch.equal(NEAREST.solve(given).codes, nearest(given).codes)


def test_inputs_that_overflow_are_refused() -> None:
    given = problem()
    given.inputs[0][0, 0] = 1e30
    with pytest.raises(NumericsError, match="not finite"):
        LearnedRounding().solve(given)


@pytest.mark.parametrize(
    "options", [{"rounds": 0}, {"damping": -0.1}, {"steps": 0.0}, {"steps": 17.0}]
)
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="learned-rounding"):
        LearnedRounding(**options)  # type: ignore[arg-type]


# --- in a graph ---------------------------------------------------------------------------------


def test_same_bits_in_every_run() -> None:
    first, second = (LearnedRounding().solve(problem(n=300)) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)
    torch.set_num_threads(2)  # rows are shared out among threads
    third = LearnedRounding().solve(problem(n=300))
    torch.set_num_threads(1)
    assert torch.equal(first.codes, third.codes)


def test_a_model_loses_less_than_with_plain_codes() -> None:
    ctx = family_context("llama")
    assert ctx.probe is not None
    expected = run(canonical("llama")[0], ctx.probe)[0]
    losses = []
    for last in (QuantizeWeights(), LearnedRounding()):
        gm, _ = canonical("llama")
        records = run_passes(gm, ctx, "W3A16-g32", InsertFakeQuant(), last)
        losses.append((run(gm, ctx.probe)[0] - expected).square().mean().item())
    table = records[-1].result.tables["weights"]
    assert table.columns[-3:] == ("start_error_db", "error_db", "changed_share")
    assert len(table.rows) == records[-1].result.changed == 15
    assert losses[1] < losses[0]
