"""GPTAQ against a slow column loop, its objective, and its retreat to GPTQ."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from panguq.errors import RecipeError
from panguq.ir.quant_spec import parse_scheme
from panguq.ir.run.interpret import run
from panguq.passes.calibrate import Calibrate
from panguq.passes.codes.gram import gram
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.passes.gptaq import AsymmetricTarget, Gptaq
from panguq.passes.gptq import Gptq
from panguq.passes.insert_fake_quant import InsertFakeQuant
from tests.model_shelf import TwoLinears, run_passes, tiny_context, trace_tiny


def problem(scheme: str = "W4A16-g32", k: int = 64, seed: int = 0, noise: float = 0.3,
            tokens: int = 400) -> WeightProblem:  # fmt: skip
    """Inputs that a quantized prefix changed by noise, which depends on the values themselves."""
    generator = torch.Generator().manual_seed(seed)
    spec = parse_scheme(scheme).weight
    assert spec is not None
    mixing = torch.randn(k, k, generator=generator) / k**0.5
    original = torch.randn(tokens, k, generator=generator) @ mixing
    change = torch.randn(k, k, generator=generator) / k**0.5 * noise
    changed = original + original @ change + noise * torch.randn(tokens, k, generator=generator)
    weight = torch.randn(8, k, generator=generator)
    return WeightProblem(
        ("fc",), weight, spec, spec.group_size_for(k), torch.float32, (changed,), (original,)
    )


def values_of(given: WeightProblem, solution: Solution) -> Tensor:
    return Gptaq().dequantize(given, solution)


def objective(given: WeightProblem, solution: Solution) -> float:
    """|Q X - W X_float|^2, from the tokens themselves."""
    got = functional.linear(given.inputs[0].double(), values_of(given, solution).double())
    wanted = functional.linear(given.float_inputs[0].double(), given.weight.double())
    return float((got - wanted).square().sum())


def notes(solution: Solution) -> dict[str, object]:
    return dict(zip(Gptaq.note_columns, solution.notes, strict=True))


def slow_gptaq(given: WeightProblem, step: Gptaq, order: list[int]) -> Tensor:
    """Codes by the paper's two updates, one column at a time, every inverse computed anew."""
    x, deviation = given.inputs[0].double(), (given.float_inputs[0] - given.inputs[0]).double()
    hessian, cross = x.T @ x, deviation.T @ x
    hessian += step.damping * hessian.diagonal().diag()
    scale, zero = step.fitted(given, gram(given.inputs))
    weight, codes = given.weight.double(), torch.zeros(given.weight.shape, dtype=torch.int8)
    for done, j in enumerate(order):
        s = scale[:, j // given.group_size].double()
        z = 0 if zero is None else zero[:, j // given.group_size].double()
        code = ((weight[:, j] / s).round() + z).clamp(given.spec.quant_min, given.spec.quant_max)
        codes[:, j] = code
        left, later = order[done:], order[done + 1 :]
        inverse = hessian[left][:, left].inverse()
        error = (weight[:, j] - (code - z) * s) / inverse[0, 0]
        # Least squares: the columns that are still free, against input j's deviation.
        answer = step.alpha * (cross[j, later] @ hessian[later][:, later].inverse())
        now = weight[:, j].clone()
        weight[:, later] += now[:, None] * answer - error[:, None] * inverse[0, 1:]
    return codes


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W3A16-g32", "W4A16-per_channel", "W8A16"])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize(("act_order", "damping"), [(False, 0.01), (True, 0.01), (True, 0.3)])
def test_codes_are_those_of_the_slow_loop(scheme, alpha, act_order, damping) -> None:
    given = problem(scheme)
    step = Gptaq(alpha=alpha, act_order=act_order, damping=damping)
    order = step.column_order(gram(given.inputs).diagonal(), given.group_size).tolist()
    solution = step.solve(given)
    assert notes(solution)["fallback"] == ""
    assert torch.equal(solution.codes, slow_gptaq(given, step, order))


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W2A16-g64", "W8A16"])
@pytest.mark.parametrize("static", [False, True])
def test_without_a_deviation_it_is_gptq(scheme, static) -> None:
    given = problem(scheme)
    given = replace(given, float_inputs=given.inputs)
    found = Gptaq(static_groups=static).solve(given)
    expected = Gptq(static_groups=static).solve(given)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert found.notes[:3] == expected.notes
    assert notes(found)["fallback"] == ""


def test_alpha_zero_is_gptq() -> None:
    given = problem()
    assert torch.equal(Gptaq(alpha=0.0).solve(given).codes, Gptq().solve(given).codes)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_it_comes_closer_to_the_float_models_output_in_the_mean(alpha) -> None:
    ratios, retreats = [], 0
    for seed in range(60):
        given = problem("W4A16-g32", seed=seed)
        solution = Gptaq(alpha=alpha).solve(given)
        retreats += bool(notes(solution)["fallback"])
        ratios.append(objective(given, solution) / objective(given, Gptq().solve(given)))
    assert sum(ratios) / len(ratios) < 0.97
    assert max(ratios) <= 1 + 1e-9
    assert retreats <= 3


def test_the_notes_are_the_objectives() -> None:
    given = problem()
    solution = Gptaq().solve(given)
    wanted = functional.linear(given.float_inputs[0].double(), given.weight.double())
    for column, candidate in (
        ("target_error_db", solution),
        ("gptq_target_error_db", Gptq().solve(given)),
    ):
        share = objective(given, candidate) / float(wanted.square().sum())
        assert notes(solution)[column] == pytest.approx(10 * math.log10(share), abs=1e-3)
    assert notes(solution)["damping"] == Gptaq().damping


def test_a_larger_error_than_gptqs_is_not_kept() -> None:
    """Few tokens at 2 bits: the answer to each input's deviation piles up."""
    retreats = 0
    for seed in range(40):
        given = problem("W2A16-g64", seed=seed, noise=0.02)
        solution = Gptaq(alpha=1.0).solve(given)
        gptq = Gptq().solve(given)
        if notes(solution)["fallback"]:
            retreats += 1
            assert notes(solution)["fallback"] == "gptq: larger error"
            assert notes(solution)["target_error_db"] == notes(solution)["gptq_target_error_db"]
            assert torch.equal(solution.codes, gptq.codes)
        assert objective(given, solution) <= objective(given, gptq) * (1 + 1e-9)
    assert 0 < retreats < 40


def test_what_is_not_finite_is_not_kept() -> None:
    """Deviations far larger than the inputs, as behind a layer that broke: updates overflow."""
    given = problem("W2A16-g64")
    huge = given.float_inputs[0] * 1e16
    given = replace(given, inputs=(given.inputs[0] * 1e-3,), float_inputs=(huge,))
    solution = Gptaq(alpha=1.0, damping=0.0).solve(given)
    assert notes(solution)["fallback"] == "gptq: not finite"
    expected = Gptq(damping=0.0).solve(given)
    assert torch.equal(solution.codes, expected.codes)
    assert values_of(given, solution).isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(tokens) -> None:
    given = problem(tokens=tokens)
    solution = Gptaq().solve(given)
    assert objective(given, solution) <= objective(given, Gptq().solve(given)) * (1 + 1e-6)


def test_dead_inputs_and_no_inputs_at_all() -> None:
    given = problem()
    dead, original = given.inputs[0].clone(), given.float_inputs[0]
    dead[:, [3, 40]] = 0.0  # quantized to nothing, but not so in the float model
    solution = Gptaq().solve(replace(given, inputs=(dead,), float_inputs=(original,)))
    assert values_of(given, solution).isfinite().all()
    nothing = torch.zeros(4, 64)
    solution = Gptaq().solve(replace(given, inputs=(nothing,), float_inputs=(nothing,)))
    assert notes(solution)["target_error_db"] == -300.0


def test_constant_and_zero_weights() -> None:
    given = problem()
    weight = given.weight.clone()
    weight[0], weight[1] = 0.0, 0.7
    solution = Gptaq().solve(replace(given, weight=weight))
    assert not values_of(given, solution)[0].any()
    assert values_of(given, solution).isfinite().all()


def test_the_target_is_that_of_the_tokens() -> None:
    given = problem()
    target = AsymmetricTarget.of(given.inputs, given.float_inputs)
    missing = functional.linear(given.inputs[0] - given.float_inputs[0], given.weight)
    wanted = functional.linear(given.float_inputs[0], given.weight)
    share = float(missing.square().sum() / wanted.square().sum())
    found = target.error_db(given.weight, given.weight)
    assert found == pytest.approx(10 * math.log10(share), abs=1e-3)


def test_the_pass_comes_closer_to_the_float_model_than_gptq() -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    wanted = TwoLinears(64, 64, 8, functional.silu)(x).detach()
    errors = []
    for step in (Gptq(), Gptaq()):
        gm, interface = trace_tiny(TwoLinears(64, 64, 8, functional.silu), x)
        ctx = tiny_context(interface, x[:256], x[256:])
        record = run_passes(gm, ctx, "W3A16-g32", Calibrate(), InsertFakeQuant(), step)[-1]
        errors.append((run(gm, {"x": x})[0] - wanted).square().sum())
    assert errors[1] < errors[0]
    table = record.result.tables["weights"]
    first, second = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert first["target_error_db"] == first["gptq_target_error_db"]  # nothing is before it
    assert second["target_error_db"] < second["gptq_target_error_db"]


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_lies_between_nothing_and_all(alpha) -> None:
    with pytest.raises(RecipeError, match="gptaq: alpha"):
        Gptaq(alpha=alpha)


def test_its_other_options_are_those_of_gptq() -> None:
    with pytest.raises(RecipeError, match="gptaq: damping"):
        Gptaq(damping=-1.0)
