"""Progressive rounding: blocks come nearer to the float blocks, and fixed codes stay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import RecipeError
from panguq.ir.edit import clone, weights_of
from panguq.ir.quant_spec import parse_scheme
from panguq.ir.run.interpret import run
from panguq.passes.calibrate import Calibrate
from panguq.passes.codes.soft_codes import SoftCodes, harden
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.passes.gptq import Gptq
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import Pass, PassContext
from panguq.passes.progressive_rounding import ProgressiveRounding
from panguq.passes.weigh_tokens import WeighTokens
from panguq.tensors.weight_store import WeightStore
from panguq.tensors.work_folder import WorkFolder
from tests.model_shelf import (
    EXPERTS,
    canonical,
    family_context,
    normal_weights,
    run_passes,
    tiny_context,
    trace_tiny,
)

SCHEME = "W3A16-g32"
QUICK = ProgressiveRounding(steps=12)


def solved(weight: Tensor, inputs: Tensor, scheme: str = SCHEME) -> tuple[WeightProblem, Solution]:
    spec = parse_scheme(scheme).weight
    assert spec is not None
    size = spec.group_size_for(weight.shape[1])
    problem = WeightProblem(("w",), weight, spec, size, torch.float32, [inputs])
    return problem, Gptq().solve(problem)


def soft_of(weight: Tensor, scheme: str = SCHEME, pull: float = 0.5) -> SoftCodes:
    inputs = torch.randn(48, weight.shape[1], generator=torch.Generator().manual_seed(3))
    problem, solution = solved(weight, inputs, scheme)
    return SoftCodes(weight, solution, problem.spec, torch.float32, pull)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_of(weight: Tensor, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, PassContext]:
    """The traced linear of a weight, and a context with these batches."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    gm, interface = trace_tiny(layer, torch.randn(3, weight.shape[1]))
    return gm, tiny_context(interface, *inputs)


def compiled(gm: fx.GraphModule, ctx: PassContext, *passes: Pass, scheme: str = SCHEME) -> Tensor:
    """The outputs for all batches after these passes, one under the other."""
    run_passes(gm, ctx, scheme, *passes)
    return torch.cat([run(gm, batch)[0].reshape(-1, 1) for batch in ctx.batches])


# --- soft codes -----------------------------------------------------------------------------------


def test_the_gradient_at_codes_and_scales_is_that_of_the_values() -> None:
    """Against autograd through the formula: Adam's first step goes by the sign alone."""
    weight, wanted = random(4, 64), random(4, 64, seed=9)
    soft = soft_of(weight)
    logit, change = soft._logit.clone().requires_grad_(), soft._change.clone().requires_grad_()
    shares = (torch.sigmoid(logit) * 1.2 - 0.1).clamp(0, 1)
    levels = soft.levels.flatten().index_put((soft.free,), soft._lower + shares).view(4, 64)
    values = levels * (soft._start * change.exp()).repeat_interleave(32, 1)
    (values - wanted).square().sum().backward()
    before, moved = soft._logit.clone(), soft._change.clone()
    soft.step(2 * (soft.values() - wanted), 1, 0.01, 0.01)
    assert torch.equal((before - soft._logit).sign(), logit.grad.sign())
    assert torch.equal((moved - soft._change).sign(), change.grad.sign())


def test_fixed_codes_are_integers_that_never_move() -> None:
    soft = soft_of(random(8, 64))
    for number, share in enumerate((0.3, 0.6, 0.9, 1.0), start=1):
        harden([soft], share)
        assert len(soft.free) <= (1 - share) * soft.levels.numel() + 1
        fixed = torch.ones(soft.levels.numel(), dtype=torch.bool)
        fixed[soft.free] = False
        before = soft.levels.flatten()[fixed]
        assert torch.equal(before, before.round())
        soft.step(random(8, 64, seed=number), number, 0.5, 0.1)
        assert torch.equal(soft.levels.flatten()[fixed], before)
    found = soft.solution()
    spec = parse_scheme(SCHEME).weight
    assert spec.quant_min <= int(found.codes.min()) and int(found.codes.max()) <= spec.quant_max
    zero = found.zero_point.repeat_interleave(32, 1)
    assert torch.equal(
        (found.codes - zero) * found.scale.float().repeat_interleave(32, 1), soft.values()
    )


@pytest.mark.parametrize("pull", [0.01, 0.5])
def test_without_a_step_the_codes_are_those_of_the_start(pull: float) -> None:
    weight = random(6, 64, seed=4)
    problem, start = solved(weight, random(48, 64, seed=3))
    soft = SoftCodes(weight, start, problem.spec, torch.float32, pull)
    harden([soft], 1.0)
    assert torch.equal(soft.solution().codes, start.codes)
    assert torch.equal(soft.solution().scale, start.scale)


# --- against a slow and obvious implementation --------------------------------------------------


def test_one_row_of_four_is_no_worse_than_gptq_and_nearly_the_best() -> None:
    """All roundings of four weights on the start's grid, enumerated."""
    scheme = "W2A16-per_channel"
    near = 0
    for seed in range(4):
        weight, inputs = random(1, 4, seed=seed), random(64, 4, seed=90 + seed) @ random(4, 4)
        problem, start = solved(weight, inputs, scheme)
        gm, ctx = linear_of(weight, [inputs])
        wanted = inputs @ weight.T
        tokens = 1 / (wanted.square() + wanted.square().median())

        def error(values: Tensor, wanted: Tensor = wanted, tokens: Tensor = tokens) -> float:
            return float(((values - wanted).square() * tokens).sum())

        learned = error(compiled(gm, ctx, InsertFakeQuant(), ProgressiveRounding(), scheme=scheme))
        assert learned <= error(inputs @ Gptq().dequantize(problem, start).T) * (1 + 1e-4)
        scale, zero = float(start.scale), float(start.zero_point)
        codes = range(problem.spec.quant_min, problem.spec.quant_max + 1)
        grid = torch.tensor(list(itertools.product(codes, repeat=4))).float()
        every = inputs @ ((grid - zero) * scale).T
        near += learned <= 1.25 * min(error(each[:, None]) for each in every.T)
    assert near >= 3


# --- blocks --------------------------------------------------------------------------------------


def error(family: str, *passes: Pass, scheme: str = "W4A8_STATIC-g32") -> float:
    """The squared error of the logits against the float model's."""
    gm, _ = canonical(family)
    ctx = family_context(family)
    wanted = [run(gm, batch)[0] for batch in ctx.batches]
    run_passes(gm, ctx, scheme, *passes)
    found = [run(gm, batch)[0] for batch in ctx.batches]
    return sum(float((f - w).square().sum()) for f, w in zip(found, wanted, strict=True))


def test_the_model_comes_nearer_than_by_gptq() -> None:
    before = (Calibrate(), InsertFakeQuant())
    gptq = error("llama", *before, Gptq())
    assert error("llama", *before, QUICK) < gptq


def test_every_block_is_told_and_none_is_worse() -> None:
    gm, _ = canonical("openpangu")  # with biases
    ctx = family_context("openpangu")
    records = run_passes(gm, ctx, SCHEME, WeighTokens(), InsertFakeQuant(), QUICK)
    table = records[-1].result.tables["blocks"]
    assert [row[1] for row in table.rows] == [4, 3, 4, 3]
    for row in table.rows:
        named = dict(zip(table.columns, row, strict=True))
        assert named["error_db"] <= named["start_error_db"]
        assert named["kept"] == (named["error_db"] < named["start_error_db"])


def test_two_runs_agree_and_a_run_goes_on(tmp_path) -> None:
    def codes(ctx: PassContext) -> dict[str, Tensor]:
        gm, _ = canonical("llama")
        run_passes(gm, ctx, SCHEME, InsertFakeQuant(), QUICK)
        return {name: tensor.clone() for name, tensor in weights_of(gm).items()}

    first = codes(family_context("llama"))
    units = WorkFolder(tmp_path / "work")
    units.open_for({"a": "b"})
    for _ in range(2):
        store = WeightStore(units=units)
        again = codes(replace(family_context("llama"), store=store))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert units.found >= 4  # the second run had every block, and computed none
    units.close()


def test_experts_keep_gptqs_codes_and_attention_learns() -> None:
    gm, _ = canonical(EXPERTS)
    ctx = family_context(EXPERTS)
    records = run_passes(gm, ctx, SCHEME, InsertFakeQuant(), QUICK)
    result = records[-1].result
    assert {skip.reason for skip in result.skipped if "experts" in skip.node} == {
        "experts keep gptq's codes"
    }
    assert [row[1] for row in result.tables["blocks"].rows] == [4, 4]


def test_a_weight_that_two_blocks_share_is_learned_by_the_first() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(torch.relu(self.one(x)))

    gm, interface = trace_tiny(normal_weights(Twice()), random(20, 32))
    ctx = tiny_context(interface, random(20, 32))
    records = run_passes(gm, ctx, SCHEME, InsertFakeQuant(), QUICK)
    assert [row[1] for row in records[-1].result.tables["blocks"].rows] == [1]


@pytest.mark.parametrize("kind", ["zero", "constant", "dead", "one token"])
def test_degenerate_input(kind: str) -> None:
    weight, inputs = random(4, 32), random(40, 32, seed=1)
    if kind == "zero":
        weight = torch.zeros(4, 32)
    elif kind == "constant":
        weight = torch.full((4, 32), 0.3)
    elif kind == "dead":
        inputs[:, 3] = 0
    else:
        inputs = inputs[:1]
    gm, ctx = linear_of(weight, [inputs])
    found = compiled(gm, ctx, InsertFakeQuant(), QUICK)
    wanted = (inputs @ weight.T).reshape(-1, 1)
    assert float((found - wanted).square().sum()) <= 0.2 * float(wanted.square().sum())


def test_a_float16_model_learns() -> None:
    layer = normal_weights(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))).half()
    gm, interface = trace_tiny(layer, random(20, 32).half())
    ctx = tiny_context(interface, random(20, 32).half())
    start = clone(gm)
    records = run_passes(gm, ctx, SCHEME, InsertFakeQuant(), QUICK)
    assert records[-1].result.tables["blocks"].rows
    found, wanted = (run(g, ctx.batches[0])[0].float() for g in (gm, start))
    assert float((found - wanted).square().sum()) < 0.2 * float(wanted.square().sum())


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"batch_sequences": 0},
        {"code_rate": -1.0},
        {"scale_rate": float("nan")},
        {"pull": 0.0},
        {"damping": -1.0},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="progressive-rounding: "):
        ProgressiveRounding(**options)
