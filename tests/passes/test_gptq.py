"""GPTQ against a slow column loop, its order of columns, its grids, and odd inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from panguq.errors import NumericsError, RecipeError
from panguq.ir.edit import weights_of
from panguq.ir.quant_spec import parse_scheme
from panguq.ir.run.interpret import run
from panguq.passes.codes.column_solver import GroupGrid, solve_columns
from panguq.passes.codes.gram import gram, inverse_factor, output_error
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.passes.codes.weight_scales import clip_ratios, min_max_scale, search_scale
from panguq.passes.gptq import Gptq, relative_errors_db
from panguq.passes.insert_fake_quant import InsertFakeQuant
from tests.model_shelf import OneLinear, run_passes, tiny_context, trace_tiny

panguq = torch.ops.panguq
SCHEMES = ("W4A16-g32", "W4A16-per_channel", "W4A16-g32-asym", "W3A16-g32", "W2A16-g64", "W8A16")
PLAIN = Gptq(clip_search=False, damping=0.01)


def correlated(tokens: int, k: int, seed: int = 0) -> Tensor:
    """Inputs `[tokens, k]` whose channels differ in size and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / k**0.5
    size = torch.rand(k, generator=generator) * 3 + 0.1
    return torch.randn(tokens, k, generator=generator) @ mixing * size


def problem(
    scheme: str, n: int = 12, k: int = 128, inputs: Tensor | None = None, seed: int = 0
) -> WeightProblem:
    spec = parse_scheme(scheme).weight
    assert spec is not None
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed + 1000))
    x = correlated(3 * k, k, seed) if inputs is None else inputs
    return WeightProblem(("fc",), weight, spec, spec.group_size_for(k), torch.float32, (x,))


def values_of(given: WeightProblem, solution: Solution) -> Tensor:
    return Gptq().dequantize(given, solution)


def error_of(given: WeightProblem, solution: Solution) -> float:
    change = values_of(given, solution).double() - given.weight
    return float(output_error(change, gram(given.inputs)).sum())


def nearest(given: WeightProblem, step: Gptq) -> Solution:
    """Round to nearest on the scales that the pass would take."""
    scale, zero = step.fitted(given, gram(given.inputs))
    spec = given.spec
    codes = panguq.quantize_weight(
        given.weight, scale, zero, given.group_size, spec.quant_min, spec.quant_max
    )
    return Solution(codes, scale, zero)


def slow_gptq(given: WeightProblem, step: Gptq, order: list[int]) -> Solution:
    """The optimal-brain-quantization update, one column at a time, every inverse computed anew."""
    hessian = gram(given.inputs)
    hessian = hessian + step.damping * hessian.diagonal().diag()
    weight = given.weight.double()
    scale, zero = step.fitted(given, gram(given.inputs))
    zero = torch.zeros_like(scale) if zero is None else zero.clone()
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    size = given.group_size
    for done, j in enumerate(order):
        group = j // size
        if not step.static_groups and done % size == 0:
            now = weight[:, group * size : (group + 1) * size].float()
            importance = gram(given.inputs).diagonal()[group * size : (group + 1) * size]
            fitted = slow_fit(now, size, given, step, importance)
            scale[:, group] = fitted[0][:, 0]
            zero[:, group] = 0 if fitted[1] is None else fitted[1][:, 0]
        s, z = scale[:, group].double(), zero[:, group].double()
        code = ((weight[:, j] / s).round() + z).clamp(given.spec.quant_min, given.spec.quant_max)
        codes[:, j] = code
        left = order[done:]
        inverse = hessian[left][:, left].inverse()
        error = (weight[:, j] - (code - z) * s) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
    return Solution(codes, scale, None if given.spec.symmetric else zero)


def slow_fit(
    weight: Tensor, size: int, given: WeightProblem, step: Gptq, importance: Tensor
) -> tuple[Tensor, Tensor | None]:
    if not step.clip_search:
        return min_max_scale(weight, size, given.spec)
    ratios = clip_ratios(step.smallest_ratio, step.steps)
    return search_scale(weight, size, given.spec, importance, ratios)


def assert_same(found: Solution, expected: Solution) -> None:
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert (found.zero_point is None) == (expected.zero_point is None)
    if found.zero_point is not None and expected.zero_point is not None:
        assert torch.equal(found.zero_point, expected.zero_point)


# --- against the slow loop ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("act_order", "damping"), [(False, 0.01), (True, 0.01), (True, 0.3)])
def test_codes_are_those_of_the_slow_loop(scheme, search, act_order, damping) -> None:
    given = problem(scheme)
    step = Gptq(act_order=act_order, clip_search=search, damping=damping)
    mean_square = gram(given.inputs).diagonal().tolist()
    order = list(range(128))
    if act_order:
        order.sort(key=lambda j: -mean_square[j])
    assert_same(step.solve(given), slow_gptq(given, step, order))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("search", [False, True])
def test_groups_fitted_to_the_updated_weight(scheme, search) -> None:
    given = problem(scheme)
    step = Gptq(act_order=False, static_groups=False, clip_search=search, damping=0.01)
    found = step.solve(given)
    assert_same(found, slow_gptq(given, step, list(range(128))))
    if found.scale.shape[1] > 1:
        fixed = replace(step, static_groups=True).solve(given)
        assert torch.equal(found.scale[:, 0], fixed.scale[:, 0])
        assert not torch.equal(found.scale, fixed.scale)


def test_by_size_without_static_groups_keeps_groups_together() -> None:
    given = problem("W3A16-g32")
    step = Gptq(static_groups=False)
    mean_square = gram(given.inputs).diagonal()
    order = step.column_order(mean_square, 32).tolist()
    assert sorted(order) == list(range(128))
    blocks = [order[start : start + 32] for start in range(0, 128, 32)]
    assert all(len({j // 32 for j in block}) == 1 for block in blocks)
    totals = [float(mean_square[block].sum()) for block in blocks]
    assert totals == sorted(totals, reverse=True)
    for block in blocks:
        squares = mean_square[block].tolist()
        assert squares == sorted(squares, reverse=True)
    assert_same(step.solve(given), slow_gptq(given, step, order))


@given(
    k=st.sampled_from([1, 5, 31, 32, 33, 64, 96, 130]),
    block=st.sampled_from([1, 7, 32, 100, 128, 1000]),
    groups=st.booleans(),
    seed=st.integers(0, 5),
)
def test_blocked_is_unblocked(k, block, groups, seed) -> None:
    """In float64, where the order of sums cannot flip a code, for sizes that do not divide."""
    size = 32 if groups and k % 32 == 0 else k
    spec = replace(parse_scheme("W4A16-g32-asym").weight, group_size=size)
    weight = torch.randn(3, k, generator=torch.Generator().manual_seed(seed)).double()
    factor = inverse_factor(gram([correlated(2 * k, k, seed)]), 0.01).factor

    def fit(group: int, now: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = min_max_scale(now, size, spec)
        assert zero is not None
        return scale[:, 0], zero[:, 0]

    grids = [GroupGrid((3, k), size, spec, fit) for _ in range(2)]
    values = [solve_columns(weight, factor, g, b) for g, b in zip(grids, (block, k), strict=True)]
    assert torch.equal(grids[0].codes, grids[1].codes)
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


def test_errors_may_wait_for_the_end_of_their_block() -> None:
    """`inside=False`: rounded to nearest within a block, spread behind it."""
    given = problem("W2A16-g32", k=64)
    scale, zero = min_max_scale(given.weight, 32, given.spec)
    factor = inverse_factor(gram(given.inputs), 0.01).factor
    grid = GroupGrid((12, 64), 32, given.spec, scale=scale, zero_point=zero)
    values = solve_columns(given.weight, factor, grid, block=32, inside=False)
    plain = panguq.dequantize_weight(
        panguq.quantize_weight(given.weight, scale, zero, 32, -2, 1), scale, zero, 32, torch.float32
    )
    assert torch.equal(values[:, :32], plain[:, :32])
    assert not torch.equal(values[:, 32:], plain[:, 32:])
    errors = (given.weight - values)[:, :32].double() / factor.diagonal()[:32]
    moved = (given.weight[:, 32:] - errors @ factor[:32, 32:]).float()
    again = panguq.quantize_weight(moved, scale[:, 1:], zero[:, 1:], 32, -2, 1)
    assert torch.equal(grid.solution()[0][:, 32:], again)


# --- what it is for -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("search", [False, True])
def test_independent_inputs_give_round_to_nearest(scheme, search) -> None:
    """A diagonal Hessian lets no column make up for another."""
    size = torch.linspace(0.5, 3, 128)
    given = problem(scheme, inputs=torch.diag(size))
    step = Gptq(clip_search=search)
    assert_same(step.solve(given), nearest(given, step))


def test_better_than_round_to_nearest_in_the_mean() -> None:
    ratios = []
    for seed in range(200):
        given = problem("W3A16-g32", n=4, k=64, seed=seed)
        ratios.append(error_of(given, PLAIN.solve(given)) / error_of(given, nearest(given, PLAIN)))
    assert sum(ratios) / len(ratios) < 0.6  # about a third is usual on such inputs
    assert sum(ratio < 1 for ratio in ratios) >= 195


def test_large_inputs_come_first_in_act_order_and_that_helps() -> None:
    assert Gptq().column_order(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 3, 2, 0]
    assert Gptq(act_order=False).column_order(torch.ones(3), 3).tolist() == [0, 1, 2]
    sums = [0.0, 0.0]
    for seed in range(40):
        given = problem("W3A16-g32", n=8, k=64, seed=seed)
        for i, act_order in enumerate((False, True)):
            sums[i] += error_of(given, replace(PLAIN, act_order=act_order).solve(given))
    assert sums[1] < sums[0]


def test_weights_that_read_one_value_are_independent_rows() -> None:
    given = problem("W4A16-g32")
    whole = Gptq().solve(given)
    for rows in (slice(0, 5), slice(5, 12)):
        part = Gptq().solve(replace(given, weight=given.weight[rows]))
        assert torch.equal(part.codes, whole.codes[rows])


def test_the_notes_are_the_outputs_errors() -> None:
    given = problem("W4A16-g32")
    step = Gptq()
    solution = step.solve(given)
    x = given.inputs[0].double()
    wanted = functional.linear(x, given.weight.double())
    notes = dict(zip(step.note_columns, solution.notes, strict=True))
    for column, candidate in (("rtn_error_db", nearest(given, step)), ("error_db", solution)):
        got = functional.linear(x, values_of(given, candidate).double())
        share = (got - wanted).square().sum() / wanted.square().sum()
        assert notes[column] == pytest.approx(10 * math.log10(float(share)), abs=1e-3)
    assert notes["damping"] == step.damping


# --- odd inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Gptq(), PLAIN, Gptq(static_groups=False, damping=0.01)])
def test_dead_inputs_keep_their_weights_and_move_no_others(step) -> None:
    x = correlated(300, 64)
    x[:, [3, 40]] = 0.0
    given = problem("W4A16-g32", k=64, inputs=x)
    solution = step.solve(given)
    dead = given.weight.clone()
    dead[:, [3, 40]] *= 0.5  # within the groups' ranges
    other = step.solve(replace(given, weight=dead))
    alive = [j for j in range(64) if j not in (3, 40)]
    if step.clip_search:  # errors of dead inputs weigh nothing, but their range counts
        assert torch.equal(solution.codes[:, alive], other.codes[:, alive])
    distance = (values_of(given, solution) - given.weight)[:, [3, 40]].abs()
    step_size = solution.scale.float().abs()[:, [0, 1]]
    inside = (solution.codes[:, [3, 40]] > -8) & (solution.codes[:, [3, 40]] < 7)
    assert (distance <= 0.5001 * step_size)[inside].all()
    assert inside.float().mean() > 0.5


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_tokens_than_inputs(tokens, damping) -> None:
    given = problem("W3A16-g32", inputs=correlated(tokens, 128))
    step = Gptq(damping=damping)
    solution = step.solve(given)
    assert values_of(given, solution).isfinite().all()
    assert error_of(given, solution) < 0.1 * error_of(given, nearest(given, step))
    used = solution.notes[step.note_columns.index("damping")]
    assert used == 0.01 if damping else 0 < used < 0.01


def test_inputs_that_are_all_zero_give_round_to_nearest() -> None:
    given = problem("W4A16-g32", inputs=torch.zeros(4, 128))
    solution = Gptq().solve(given)
    assert_same(solution, nearest(given, Gptq()))
    assert solution.notes[:2] == (-300.0, -300.0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 0.7, -1.5])
@pytest.mark.parametrize("static", [False, True])
def test_constant_weights(scheme, value, static) -> None:
    given = problem(scheme)
    given = replace(given, weight=torch.full((3, 128), value))
    solution = Gptq(static_groups=static).solve(given)
    values = values_of(given, solution)
    assert values.isfinite().all()
    if value == 0:
        assert not values.any()
    else:
        bound = 10 * math.log10(0.03)
        assert relative_errors_db(given.weight, [values], gram(given.inputs))[0] < bound


def test_one_group_of_zeros_among_others() -> None:
    given = problem("W4A16-g32")
    weight = given.weight.clone()
    weight[:, 32:64] = 0.0
    for static in (False, True):
        step = Gptq(static_groups=static)
        solution = step.solve(replace(given, weight=weight))
        assert values_of(given, solution).isfinite().all()


def test_inputs_that_overflow_are_an_error() -> None:
    given = problem("W4A16-g32", inputs=torch.full((4, 128), 1e30))
    with pytest.raises(NumericsError, match="not finite"):
        Gptq().solve(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_stores_8_bit_scales_as_it_can(dtype) -> None:
    given = replace(problem("W8A16"), dtype=dtype)
    for static in (False, True):
        scale = Gptq(static_groups=static).solve(given).scale
        assert scale.dtype == torch.float32
        assert torch.equal(scale, scale.to(dtype).float())


def test_scales_below_8_bits_are_bfloat16() -> None:
    solution = Gptq().solve(problem("W4A16-g32-asym"))
    assert solution.scale.dtype == torch.bfloat16
    assert solution.zero_point is not None and solution.zero_point.dtype == torch.int8


# --- the pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_pass_lowers_the_matmuls_error(scheme) -> None:
    x = correlated(300, 128)
    gm, interface = trace_tiny(OneLinear(128, 6), x)
    plain, _ = trace_tiny(OneLinear(128, 6), x)
    ctx = tiny_context(interface, x[:200], x[200:])
    record = run_passes(gm, ctx, scheme, InsertFakeQuant(), Gptq())[-1]
    run_passes(plain, ctx, scheme, InsertFakeQuant())
    wanted = OneLinear(128, 6)(x).detach()
    errors = [(run(g, {"x": x})[0] - wanted).square().sum() for g in (gm, plain)]
    assert errors[0] < errors[1]
    table = record.result.tables["weights"]
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["weight"] == "fc:linear"
    share = float(errors[0] / (wanted - OneLinear(128, 6).fc.bias.detach()).square().sum())
    assert row["error_db"] == pytest.approx(10 * math.log10(share), abs=0.01)
    assert row["error_db"] < row["rtn_error_db"]
    assert "fc.weight" not in weights_of(gm)


def test_the_same_bits_in_each_run_and_nearly_so_on_more_threads() -> None:
    """One thread count: the same bits. Another may split BLAS's sums elsewhere, which can turn the
    codes of values that lie within float32's error of a tie, and what follows from them."""
    given = problem("W4A16", n=96, k=256)
    first, second = Gptq().solve(given), Gptq().solve(given)
    assert_same(first, second)
    assert first.notes == second.notes
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        other = Gptq().solve(given)
    finally:
        torch.set_num_threads(threads)
    assert (other.codes != first.codes).float().mean() < 1e-3
    assert error_of(given, other) == pytest.approx(error_of(given, first), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -0.1}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"block_size": 0}, "block_size"),
        ({"smallest_ratio": 0.0}, "smallest_ratio"),
        ({"steps": 0}, ".*steps 0"),
    ],
)
def test_options_that_make_no_sense(options, message) -> None:
    with pytest.raises(RecipeError, match=f"gptq: {message}"):
        Gptq(**options)
