"""BiLLM: its searches against brute force, its loop against a slow one, and its bits counted."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, fx

import panguq
from panguq.compiled_module import CompiledModule
from panguq.errors import RecipeError
from panguq.evaluation import weight_figures
from panguq.ir.edit import weights_of
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.run.interpret import run
from panguq.passes.billm import BiLlm, best_pair, block_order, residual_pair, salient_count
from panguq.passes.codes.gram import gram, inverse_factor, output_error
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.passes.codes.weight_scales import min_max_scale, quantize_groups
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.quantize_weights import QuantizeWeights
from tests.model_shelf import (
    OneLinear,
    run_passes,
    shared_model,
    tiny_context,
    token_ids,
    trace_tiny,
)

SPEC = SCHEMES["W1A16"].weight
assert SPEC is not None


def problem(weight: Tensor, inputs: Tensor) -> WeightProblem:
    return WeightProblem(("fc",), weight, SPEC, 32, torch.float32, [inputs])


def random_problem(n: int, k: int, tokens: int, seed: int = 0) -> WeightProblem:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / math.sqrt(k) + torch.eye(k)
    inputs = torch.randn(tokens, k, generator=generator) @ mixing
    return problem(torch.randn(n, k, generator=generator), inputs)


def values(step: BiLlm, given: WeightProblem) -> Tensor:
    return step.dequantize(given, step.solve(given))


def error(given: WeightProblem, weight: Tensor) -> float:
    return float(output_error(weight - given.weight, gram(given.inputs)).sum())


# --- the searches -------------------------------------------------------------------------------


def binarized(w: Tensor) -> Tensor:
    """a * sign(w), a = mean |w| of each row."""
    return w.abs().mean(1, keepdim=True) * torch.where(w < 0, -1.0, 1.0)


@pytest.mark.parametrize("most", [2, 7, 50])
def test_as_many_columns_are_salient_as_leave_least_error(most):
    w = torch.randn(6, 12, dtype=torch.float64) * torch.arange(12, 0, -1)
    errors = [
        float((w - torch.cat((binarized(w[:, :c]), binarized(w[:, c:])), 1)).square().sum())
        for c in range(1, min(most, 12))
    ]
    assert salient_count(w.abs().T, most) == errors.index(min(errors)) + 1


def test_the_pair_of_magnitudes_is_the_best_of_all_splits():
    sizes = torch.randn(4, 9, dtype=torch.float64).abs()
    small, large = best_pair(sizes.T)
    for i, row in enumerate(sizes):
        ordered = row.sort().values
        found = {}
        for t in range(1, 9):
            low, high = ordered[:t], ordered[t:]
            loss = (low - low.mean()).square().sum() + (high - high.mean()).square().sum()
            found[float(loss)] = (float(low.mean()), float(high.mean()))
        assert (float(small[i]), float(large[i])) == pytest.approx(found[min(found)])


def test_the_greedy_residual_binarizes_twice():
    w = torch.randn(5, 10, dtype=torch.float64)
    first = binarized(w)
    twice = first + binarized(w - first)
    small, large = (m[:, None] for m in residual_pair(w.abs().T))
    assert (twice.abs() - small).abs().minimum((twice.abs() - large).abs()).max() < 1e-12


def test_the_joint_residual_is_at_least_as_near():
    sizes = torch.randn(20, 30, dtype=torch.float64).abs()

    def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
        return (sizes - pair[0]).abs().minimum((sizes - pair[1]).abs()).square().sum(0)

    joint, greedy = loss(best_pair(sizes)), loss(residual_pair(sizes))
    assert (joint <= greedy + 1e-12).all() and (joint < greedy).any()


def test_whole_blocks_come_by_falling_mean_square_and_a_short_one_last():
    mean_square = torch.tensor([1.0, 2, 5, 4, 9])
    assert block_order(mean_square, 2, True).tolist() == [2, 3, 1, 0, 4]
    assert block_order(mean_square, 2, False).tolist() == [0, 1, 2, 3, 4]


# --- the loop -----------------------------------------------------------------------------------


def slow_billm(given: WeightProblem, step: BiLlm) -> Tensor:
    """Column after column, every error spread at once over all columns that may see it."""
    w = given.weight.clone()
    hessian = gram(given.inputs)
    order = block_order(hessian.diagonal(), step.block_size, step.act_order)
    u = inverse_factor(hessian, step.damping, order).factor
    w, k = w[:, order], w.shape[1]
    result = torch.empty_like(w)
    for start in range(0, k, step.block_size):
        stop = min(start + step.block_size, k)
        block = w[:, start:stop].clone()
        salience = (block / u.diagonal()[start:stop]).square().sum(0)
        ranked = salience.argsort(descending=True).tolist()
        salient = set(ranked[: salient_count(block[:, ranked].abs().T, step.most_salient)])
        rest = [j for j in range(stop - start) if j not in salient]
        residual = best_pair if step.residual == "joint" else residual_pair
        pairs = {True: residual(block[:, sorted(salient)].abs().T),
                 False: best_pair(block[:, rest].abs().T)}  # fmt: skip
        errors = torch.zeros_like(block)
        for j in range(start, stop):
            for i in range(len(w)):
                small, large = (float(m[i].bfloat16()) for m in pairs[j - start in salient])
                levels = (-large, -small, small, large)
                result[i, j] = min(levels, key=lambda level: abs(level - float(w[i, j])))
            errors[:, j - start] = (w[:, j] - result[:, j]) / u[j, j]
            if step.spread_inside:
                w[:, j + 1 :] -= errors[:, j - start, None] * u[j, j + 1 :]
        if not step.spread_inside:
            w[:, stop:] -= errors @ u[start:stop, stop:]
    back = torch.empty_like(result)
    back[:, order] = result
    return back


@pytest.mark.parametrize("residual", ["joint", "greedy"])
@pytest.mark.parametrize("spread_inside", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("k", [32, 40])
def test_the_loop_does_what_a_slow_one_does(residual, spread_inside, act_order, k):
    step = BiLlm(block_size=16, residual=residual, spread_inside=spread_inside, act_order=act_order)
    given = random_problem(6, k, 80)
    given = problem(given.weight.double(), given.inputs[0])
    assert torch.equal(values(step, given), slow_billm(given, step).float())


def test_the_output_error_is_below_rounding_to_nearest_at_one_bit():
    ratios = []
    for seed in range(30):
        given = random_problem(16, 64, 256, seed)
        scale, zero = min_max_scale(given.weight, 32, SPEC)
        nearest = quantize_groups(given.weight.unflatten(1, (-1, 32)), scale, zero, SPEC).flatten(1)
        ratios.append(error(given, values(BiLlm(), given)) / error(given, nearest))
    assert sum(ratios) / len(ratios) < 0.2


def test_each_way_beyond_the_paper_lowers_the_mean_error():
    plain = dict(residual="greedy", spread_inside=False, act_order=False)
    means = []
    for options in (plain, {**plain, "spread_inside": True}, {}):
        problems = [random_problem(16, 96, 512, seed) for seed in range(20)]
        step = BiLlm(block_size=32, **options)  # type: ignore[arg-type]
        means.append(sum(error(p, values(step, p)) for p in problems))
    assert means[0] > means[1] > means[2]


# --- degenerate inputs --------------------------------------------------------------------------


def test_a_zero_weight_stays_zero():
    given = random_problem(4, 64, 128)
    zero = problem(torch.zeros(4, 64), given.inputs[0])
    assert not values(BiLlm(), zero).any()


def test_constant_rows_are_exact():
    given = random_problem(3, 64, 128)
    constant = problem(torch.tensor([[1.0], [-0.5], [0.25]]).repeat(1, 64), given.inputs[0])
    assert torch.equal(values(BiLlm(), constant), constant.weight)


@pytest.mark.parametrize("tokens", [1, 7])
def test_inputs_of_low_rank_give_finite_weights(tokens):
    given = random_problem(4, 64, tokens)
    assert values(BiLlm(), given).isfinite().all()


def test_dead_inputs_disturb_nobody():
    given = random_problem(4, 64, 256)
    inputs = given.inputs[0].clone()
    inputs[:, [3, 40]] = 0
    dead = problem(given.weight, inputs)
    assert values(BiLlm(), dead).isfinite().all()
    assert error(dead, values(BiLlm(), dead)) < error(dead, torch.zeros_like(given.weight))


def test_one_column_and_one_token():
    given = problem(torch.tensor([[0.5], [-2.0]]), torch.ones(1, 1))
    assert torch.equal(values(BiLlm(), given), given.weight)


# --- storage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [96, 100, 576])
def test_the_stored_bits_are_those_of_the_table(k):
    gm, solution = compiled_one(k)
    blocks = -(-k // 128)
    stored = sum(t.nbytes for name, t in weights_of(gm).items() if name != "fc.bias")
    assert stored == 10 * -(-k // 8) * 2 + 10 * blocks * 4 * 2 + -(-k // 8)
    _, salient, paper, true = solution.notes
    assert float(str(true)) == pytest.approx(8 * stored / (10 * k), abs=5e-4)
    assert float(str(paper)) == pytest.approx(1 + float(str(salient)), abs=1e-3)


def compiled_one(k: int) -> tuple[fx.GraphModule, Solution]:
    """The graph after billm, and the solution that it stores. k = 100 needs no groups."""
    gm, interface = trace_tiny(OneLinear(k, 10), torch.randn(3, k))
    x = torch.randn(200, k, generator=torch.Generator().manual_seed(1))
    context = tiny_context(interface, x)
    given = problem(gm.get_buffer("fc.weight").clone(), x)
    scheme = "W1A16-per_channel" if k == 100 else "W1A16"
    run_passes(gm, context, scheme, InsertFakeQuant(), BiLlm())
    solution: Solution = BiLlm().solve(given)
    expected = x @ BiLlm().dequantize(given, solution).T + gm.get_buffer("fc.bias")
    assert torch.allclose(run(gm, {"x": x})[0], expected, atol=1e-5)
    return gm, solution


def test_other_schemes_are_refused():
    gm, interface = trace_tiny(OneLinear(64, 10), torch.randn(3, 64))
    context = tiny_context(interface, torch.randn(50, 64))
    with pytest.raises(RecipeError, match="the scheme of fc:linear has codes of int2"):
        run_passes(gm, context, "W2A16", InsertFakeQuant(), BiLlm())


@functools.cache
def compiled_llama() -> CompiledModule:
    return panguq.compile(shared_model("llama"), "w1-billm", calibration=token_ids(4, 32))


def test_a_compiled_model_is_saved_loaded_and_run(tmp_path):
    compiled, ids = compiled_llama(), token_ids(2, 12, 5)
    compiled.save(tmp_path / "model")
    logits = compiled(ids).logits
    assert torch.equal(panguq.load(tmp_path / "model")(ids).logits, logits)
    fake = compiled.at_stage("fake-quant")(ids).logits
    assert (logits - fake).norm() < 0.02 * fake.norm()  # the kernel multiplies in bfloat16
    assert {m.kernel for m in compiled.report.matmuls if not m.gives_logits} == {
        "panguq_cpu.binary_linear"
    }
    # hidden 64: 2 bits, 4 magnitudes of 16 bits for 64 or 96 columns, and the flags.
    assert 2.6 < weight_figures(compiled)["bits_per_weight"] < 3.1


def test_the_same_inputs_give_the_same_bits():
    one, other = (weights_of(compiled_one(96)[0]) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    given = random_problem(4, 64, 100)
    codes = [step.solve(given).codes for step in (BiLlm(), BiLlm(), BiLlm(residual="greedy"))]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_checkpoints_and_onnx_refuse_it(tmp_path):
    compiled = compiled_llama()
    with pytest.raises(panguq.PanguqError, match="no checkpoint can express"):
        compiled.save(tmp_path / "serving", format="compressed-tensors")
    with pytest.raises(panguq.PanguqError, match="does not know the op"):
        compiled.export_onnx(tmp_path / "model.onnx")


def test_rounding_instead_stays_possible():
    gm, interface = trace_tiny(OneLinear(64, 10), torch.randn(3, 64))
    run_passes(gm, tiny_context(interface), "W1A16", InsertFakeQuant(), QuantizeWeights())
    assert gm.get_buffer("fc.weight_codes").shape == (10, 8)
