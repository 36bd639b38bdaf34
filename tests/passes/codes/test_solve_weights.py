"""The frame of all passes that solve for codes: which problems it makes, and what it does with
solutions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import InputError, NumericsError, RecipeError
from panguq.ir.edit import set_tensor, weights_of
from panguq.ir.ops.packing import unpack_int4
from panguq.ir.quant_spec import parse_scheme
from panguq.ir.run.interpret import run, values
from panguq.passes.calibrate import Calibrate
from panguq.passes.codes.solve_weights import SolveWeights
from panguq.passes.codes.weight_problem import Solution, WeightProblem, quantizer_of
from panguq.passes.codes.weight_scales import min_max_scale
from panguq.passes.gptq import Gptq
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import PassContext
from panguq.passes.pipeline.runner import PassRecord
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.schedule import check_passes
from panguq.tensors.weight_store import WeightStore
from tests.model_shelf import canonical, family_context, run_passes, tiny_context, trace_tiny

panguq = torch.ops.panguq


@dataclass(frozen=True)
class Nearest(SolveWeights):
    """Round to nearest, noting every problem."""

    name: ClassVar[str] = "nearest"
    note_columns: ClassVar[tuple[str, ...]] = ("tokens",)
    problems: list[WeightProblem] = field(default_factory=list)

    def solve(self, problem: WeightProblem) -> Solution:
        kept = tuple(value.clone() for value in problem.inputs)
        self.problems.append(replace(problem, inputs=kept))
        spec = problem.spec
        weight = problem.weight.to(problem.dtype)
        scale, zero = min_max_scale(weight, problem.group_size, spec)
        codes = panguq.quantize_weight(
            weight, scale, zero, problem.group_size, spec.quant_min, spec.quant_max
        )
        tokens = sum(value.numel() // value.shape[-1] for value in problem.inputs)
        return Solution(codes, scale, zero, notes=(tokens,))


@dataclass(frozen=True)
class Zeros(Nearest):
    """Solves every weight by zeros."""

    name: ClassVar[str] = "zeros"

    def solve(self, problem: WeightProblem) -> Solution:
        solution = super().solve(problem)
        return replace(solution, codes=torch.zeros_like(solution.codes))


class Branches(nn.Module):
    """Two matmuls that read one value, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(32, 8), nn.Linear(32, 24)
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], dim=-1))


FOUR_BITS = parse_scheme("W4A16-g32").weight
X = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))


def compiled(
    step: SolveWeights | QuantizeWeights, scheme: str = "W4A16-g32", module: nn.Module | None = None
) -> tuple[fx.GraphModule, PassRecord]:
    module = module or Branches()
    x = X.to(next(module.parameters()).dtype)
    gm, interface = trace_tiny(module, x)
    ctx = tiny_context(interface, x[:25], x[25:])
    return gm, run_passes(gm, ctx, scheme, Calibrate(), InsertFakeQuant(), step)[-1]


# --- problems -----------------------------------------------------------------------------------


def test_weights_that_read_one_value_are_one_problem() -> None:
    step = Nearest()
    compiled(step)
    both, last = step.problems
    model = Branches()
    assert both.names == ("left:linear", "right:linear")
    assert torch.equal(both.weight, torch.cat([model.left.weight, model.right.weight]))
    assert (both.group_size, both.spec.bits, both.dtype) == (32, 4, torch.float32)
    assert [tuple(value.shape) for value in both.inputs] == [(25, 32), (15, 32)]
    assert torch.equal(torch.cat(list(both.inputs)), X)
    assert last.names == ("last:linear",)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_query_key_and_value_share_a_problem_in_every_family(family) -> None:
    gm, _ = canonical(family)
    step = Nearest()
    run_passes(gm, family_context(family, 2, 8), "W4A16-g32", InsertFakeQuant(), step)
    shared = [len(problem.names) for problem in step.problems]
    mlp = [1, 1] if family == "opt" else [2, 1]
    assert shared == [3, 1, *mlp] * 2 + [1]


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W8A8", "W8A8_DYNAMIC", "W4A4"])
def test_inputs_are_those_behind_all_that_is_quantized(scheme) -> None:
    """What the finished graph computes there, activations' own quantization included."""
    step = Nearest()
    gm, _ = compiled(step, scheme)
    last = next(n for n in reversed(gm.graph.nodes) if "linear" in n.name)
    batches = [{"x": X[:25]}, {"x": X[25:]}]
    for batch, value in zip(batches, step.problems[1].inputs, strict=True):
        assert torch.equal(values(gm, batch, {last.args[0]})[last.args[0]], value)


def test_the_matmuls_behind_see_what_was_chosen() -> None:
    step = Zeros()
    compiled(step)
    biases = torch.cat([Branches().left.bias, Branches().right.bias])
    assert torch.equal(torch.cat(list(step.problems[1].inputs)), biases.expand(40, 32))


def test_float_inputs_come_where_a_pass_asks_for_them() -> None:
    class Beside(Zeros):
        beside_float: ClassVar[bool] = True

    step = Beside()
    compiled(step, "W8A8")
    model = Branches()
    wanted = torch.cat([model.left(X), model.right(X)], dim=-1)
    assert torch.equal(torch.cat(list(step.problems[1].float_inputs)), wanted)
    plain = Nearest()
    compiled(plain)
    assert all(not problem.float_inputs for problem in plain.problems)


def test_a_tied_weight_is_solved_once_and_the_rest_is_said() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    step = Nearest()
    gm, record = compiled(step, module=Tied())
    assert [problem.names for problem in step.problems] == [("a:linear",)]
    assert [(s.node, s.reason) for s in record.result.skipped] == [
        ("b:linear", "its weight is that of a:linear")
    ]
    assert record.result.changed == 1
    expected, _ = compiled(QuantizeWeights(), module=Tied())
    assert torch.equal(run(gm, {"x": X})[0], run(expected, {"x": X})[0])


# --- solutions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    ["W8A8", "W8A16", "W6A16-g32", "W4A16-g32", "W4A16-g32-asym", "W3A16-g32", "W2A16-g32", "W4A4"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_to_nearest_through_the_frame_is_quantize_weights(scheme, dtype) -> None:
    """The same stored bits, and the same outputs."""
    module = Branches().to(dtype)
    solved, record = compiled(Nearest(), scheme, module)
    expected, _ = compiled(QuantizeWeights(), scheme, module)
    assert record.result.changed == 3
    found, wanted = weights_of(solved), weights_of(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    batch = {"x": X.to(dtype)}
    assert torch.equal(run(solved, batch)[0], run(expected, batch)[0])


def test_rows_go_back_to_their_weights() -> None:
    gm, _ = compiled(Nearest())
    found, model = weights_of(gm), Branches()
    for name, linear in (("left", model.left), ("right", model.right)):
        scale = found[f"{name}.weight_scale"]
        wanted, _ = min_max_scale(linear.weight.detach(), 32, FOUR_BITS)
        assert torch.equal(scale, wanted)
        codes = unpack_int4(found[f"{name}.weight_codes"])
        assert codes.shape == linear.weight.shape


def test_rows_of_a_solution() -> None:
    whole = Solution(
        torch.arange(12, dtype=torch.int8).view(4, 3), torch.rand(4, 1), torch.ones(4, 1),
        {"flags": torch.arange(4)}, {"order": torch.arange(3)}, (7,),
    )  # fmt: skip
    part = whole.rows(slice(1, 3))
    assert torch.equal(part.codes, whole.codes[1:3]) and torch.equal(part.scale, whole.scale[1:3])
    assert part.zero_point is not None and len(part.zero_point) == 2
    assert part.extra["flags"].tolist() == [1, 2]
    assert part.shared["order"].tolist() == [0, 1, 2] and part.notes == (7,)
    assert replace(whole, zero_point=None).rows(slice(0, 1)).zero_point is None


def test_the_table_names_every_weight() -> None:
    _, record = compiled(Nearest())
    table = record.result.tables["weights"]
    assert table.columns == ("weight", "bits", "group_size", "weight_sqnr_db", "tokens")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["weight"] for row in rows] == ["left:linear", "right:linear", "last:linear"]
    for row, linear in zip(rows, (Branches().left, Branches().right, Branches().last), strict=True):
        assert (row["bits"], row["group_size"], row["tokens"]) == (4, 32, 40)
        weight = linear.weight.detach()
        scale, _ = min_max_scale(weight, 32, FOUR_BITS)
        step = scale.float()
        noise = (weight / step).round().clamp(-8, 7) * step - weight
        wanted = 10 * torch.log10(weight.square().sum() / noise.square().sum())
        assert row["weight_sqnr_db"] == pytest.approx(float(wanted), abs=1e-3)


def test_matmuls_that_are_not_quantized_are_left_alone() -> None:
    step = Nearest()
    gm, record = compiled(step, "FLOAT")
    assert (record.result.changed, step.problems) == (0, [])
    assert "left.weight" in weights_of(gm)


# --- what cannot be done ------------------------------------------------------------------------


def test_without_calibration_data() -> None:
    gm, interface = trace_tiny(Branches(), X)
    ctx = PassContext(interface, WeightStore())
    with pytest.raises(InputError, match="no calibration data"):
        run_passes(gm, ctx, "W4A16-g32", InsertFakeQuant(), Gptq())


def test_before_anything_is_quantized() -> None:
    with pytest.raises(RecipeError, match="needs QDQ"):
        check_passes([Gptq()])


def test_an_input_that_is_not_finite_is_named() -> None:
    x = X.clone()
    x[0, 0] = float("nan")
    gm, interface = trace_tiny(Branches(), X)
    with pytest.raises(NumericsError, match="activation x"):
        run_passes(gm, tiny_context(interface, x), "W4A16-g32", InsertFakeQuant(), Gptq())


def test_a_weight_that_is_not_finite_is_named() -> None:
    gm, interface = trace_tiny(Branches(), X)
    ctx = tiny_context(interface, X)
    run_passes(gm, ctx, "W4A16-g32", InsertFakeQuant())
    set_tensor(gm, "right.weight", torch.full((24, 32), float("inf")))
    with pytest.raises(NumericsError, match=r"weight right\.weight"):
        Gptq().run(gm, ctx)


def test_the_quantizer_behind_a_matmul() -> None:
    gm, interface = trace_tiny(Branches(), X)
    run_passes(gm, tiny_context(interface, X), "W4A16-g32", InsertFakeQuant())
    matmul = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert quantizer_of(matmul).node.target is panguq.quantize_weight.default
