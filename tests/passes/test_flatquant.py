"""flatquant: the same function in float64, less error behind it, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import panguq
from panguq.check.ascend_read import load_ascend_v1
from panguq.check.report import check_folder
from panguq.errors import ExportError, InputError, RecipeError
from panguq.formats.checkpoint.ascend_v1_tensors import loader_split
from panguq.ir.call_arguments import arguments, operand
from panguq.ir.edit import ancestors, clone, find_label, op_name
from panguq.ir.node_meta import meta_of
from panguq.ir.run.interpret import compute, run
from panguq.ir.views import Linear
from panguq.lowering.ascend.op_times.nodes import node_cost
from panguq.lowering.targets import find_target
from panguq.passes.flatquant import FlatQuant
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import PassContext
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.passes.transforms.factors import KroneckerFactors, split_axis
from panguq.passes.transforms.learned import RoundedRows
from panguq.passes.transforms.stability import stability
from tests.model_folders import make_model, make_tokenizer
from tests.model_shelf import (
    TwoLinears,
    canonical,
    family_context,
    normal_weights,
    run_passes,
    tiny_context,
    trace_tiny,
)

QUICK = FlatQuant(epochs=2)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the pieces ---------------------------------------------------------------------------------


def test_the_op_is_the_dense_kronecker_product() -> None:
    x, left, right = seeded(2, 3, 6), seeded(2, 2), seeded(3, 3, seed=1)
    found = torch.ops.panguq.kronecker(x, left, right)
    torch.testing.assert_close(found, x @ torch.kron(left, right))
    with pytest.raises(InputError, match=r"\[2, 2\] and \[2, 2\] do not fit rows of 6"):
        torch.ops.panguq.kronecker(x, left, left)


def slow_loader_split(n: int) -> tuple[int, int]:
    """n = (a - b)(a + b) with the smallest a, counted up."""
    a = math.isqrt(n - 1) + 1
    while math.isqrt(a * a - n) ** 2 != a * a - n:
        a += 1
    b = math.isqrt(a * a - n)
    return a - b, a + b


def test_an_axis_is_split_as_the_loader_does_where_the_kernel_takes_that() -> None:
    for k in range(8, 4096, 8):
        split, wanted = split_axis(k), slow_loader_split(k)
        assert loader_split(k) == wanted
        if split is None:
            assert max(wanted) > 256 or wanted[1] % 8
        else:
            assert math.prod(split) == k and max(split) <= 256
            assert split == wanted or wanted[1] % 8
    assert split_axis(4864) == (76, 64) and slow_loader_split(4864) == (64, 76)
    assert split_axis(13) == (1, 13) and split_axis(257) is None and split_axis(526) is None


def test_weights_take_up_the_inverse() -> None:
    """Against dense matrices, with factors along both axes."""
    factors = KroneckerFactors(seeded(2, 2), seeded(3, 3, seed=1))
    weight, rows, columns = seeded(4, 6), torch.rand(4).double() + 1, torch.rand(6).double() + 1
    into = torch.empty(4, 6)
    factors.absorbed(weight, into, {0: rows, 1: columns})
    x = seeded(5, 6, seed=2).double()
    turned = x / columns @ torch.kron(factors.left, factors.right).double()
    torch.testing.assert_close(turned @ into.double().T, x @ (weight.double() * rows[:, None]).T,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    dense = torch.linalg.cond(torch.kron(factors.left, factors.right).double(), 2)
    assert factors.condition == pytest.approx(float(dense))


def test_the_gradient_of_rounded_rows() -> None:
    """As written out: d/dx is 1 inside and 0 beyond, d/dscale what is left of the code."""
    x = torch.tensor([[0.2, -0.9, 3.0, -7.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    found = RoundedRows.apply(x, scale, -4, 3)
    assert found.tolist() == [[0.0, -1.0, 1.5, -2.0]]
    found.backward(torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    assert x.grad.tolist() == [[1.0, 2.0, 0.0, 0.0]]
    expected = 1 * (0 - 0.4) + 2 * (-2 + 1.8) + 4 * 3 + 8 * -4
    assert scale.grad.item() == pytest.approx(expected)


def test_growth_along_a_text_is_seen() -> None:
    flat, growing = torch.ones(2, 32), torch.logspace(0, 1, 32).repeat(2, 1)
    assert not stability([flat.flatten()], [32]).grows
    found = stability([growing.flatten()], [32])
    assert found.grows and found.late == pytest.approx(10 * math.log10(growing[0, -8:].mean()))
    assert stability([torch.ones(8)], [8]).early == ""  # too short to tell


# --- the pass -----------------------------------------------------------------------------------


def two(k: int, *batches: Tensor, seed: int = 0) -> tuple[object, PassContext]:
    model = normal_weights(TwoLinears(k, 16, 8))
    gm, interface = trace_tiny(model, torch.randn(3, k))
    return gm, tiny_context(interface, *batches)


def outlying(k: int) -> list[Tensor]:
    """Two channels a hundred times the others, one that is dead, one that is constant."""
    batches = [seeded(24, k, seed=i) for i in range(3)]
    for x in batches:
        x[:, 1:3] *= 100
        x[:, 4], x[:, 5] = 0.0, 1.0
    return batches


def error(gm: object, ctx: PassContext, passes: list[object]) -> float:
    """The relative squared error of the outputs once all is quantized."""
    wanted = [run(gm, batch) for batch in ctx.batches]
    quantized = clone(gm)
    run_passes(quantized, ctx, "W4A4", *passes, InsertFakeQuant(), QuantizeWeights())
    total = size = 0.0
    for batch, outputs in zip(ctx.batches, wanted, strict=True):
        for found, output in zip(run(quantized, batch), outputs, strict=True):
            total += float((found - output).square().sum())
            size += float(output.square().sum())
    return total / size


@pytest.mark.parametrize("k", [24, 26, 64])
def test_outliers_cost_less_behind_it(k: int) -> None:
    """The runner proves that the float function stays; 26 has no factors near to each other."""
    gm, ctx = two(k, *outlying(k))
    plain = error(gm, ctx, [])
    assert error(gm, ctx, [replace(QUICK, epochs=20)]) < 0.5 * plain


def test_an_input_without_small_factors_is_left_alone() -> None:
    gm, ctx = two(526, *outlying(526))
    result = run_passes(gm, ctx, "W4A4", QUICK)[2].result
    assert result.changed == 1  # the second linear's
    assert "526 inputs have no two factors that are small enough" in result.skipped[0].reason


def test_other_schemes_are_left_alone_and_need_no_data() -> None:
    gm, ctx = two(24)
    result = run_passes(gm, ctx, "W4A8-per_channel", QUICK)[2].result
    assert result.changed == 0 and "only 4-bit inputs" in result.skipped[0].reason
    with pytest.raises(InputError, match="no calibration data"):
        run_passes(gm, ctx, "W4A4", QUICK)


def test_zeros_alone_change_nothing_for_the_worse() -> None:
    gm, ctx = two(24, torch.zeros(4, 24))
    assert error(gm, ctx, [QUICK]) < 0.05  # the biases remain


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs 0 must be at least 1"),
        ({"learning_rate": 0.5}, r"learning_rate 0.5 must lie in \(0, 0.1\]"),
        ({"alpha": math.nan}, "alpha nan must lie in"),
        ({"blocks_at_once": 0}, "blocks_at_once 0"),
    ],
)
def test_wrong_options(options: dict[str, float], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        FlatQuant(**options)  # type: ignore[arg-type]


def test_a_decoder_block_by_block() -> None:
    gm, _ = canonical("llama")
    ctx = replace(family_context("llama"), written=1, warnings=[])
    again = clone(gm)
    result = run_passes(gm, ctx, "W4A4", QUICK, InsertFakeQuant())[2].result
    table = result.tables["blocks"]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["sites"] for row in rows] == [4, 4, 1]  # the last one is the logits'
    assert all(row["db_after"] <= row["db_before"] for row in rows)
    assert all(isinstance(row["written_db_late"], float) for row in rows)
    maps = [node for node in gm.graph.nodes if op_name(node) == "kronecker"]
    assert len(maps) == result.changed == 9
    for node in maps:  # q, k and v read one, and its clip
        (quantizer,) = node.users
        linears = {u for u in quantizer.users for u in u.users for u in u.users}
        clips = {meta_of(n).input_clip for n in linears if Linear.match(n) is not None}
        assert clips == {arguments(quantizer)["clip"]} and 0 < clips.pop() < 1
    run_passes(again, ctx, "W4A4", QUICK, InsertFakeQuant())
    batch = ctx.batches[0]
    assert torch.equal(run(gm, batch)[0], run(again, batch)[0])  # deterministic


class Apart(nn.Module):
    """Nothing but a linear: there is no block in front."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.only(x)
        return result


def test_one_linear_alone() -> None:
    gm, interface = trace_tiny(normal_weights(Apart()), torch.randn(3, 24))
    ctx = tiny_context(interface, *outlying(24))
    assert error(gm, ctx, [replace(QUICK, epochs=20)]) < 0.5 * error(gm, ctx, [])


# --- on Ascend ----------------------------------------------------------------------------------

IDS = torch.arange(3, 67)[None]


def region(gm: fx.GraphModule, x: fx.Node, value: Tensor, end: fx.Node) -> Tensor:
    """The value of the node `end`, given that of x."""
    known = {x: value}
    needed = ancestors([end], stop=[x])
    for node in gm.graph.nodes:
        if node in needed and node is not x:
            known[node] = compute(gm, node, known)
    return known[end]


def with_rows(m: int, x: Tensor) -> list[int]:
    """The sizes of x with so many rows."""
    return [m, *(int(size) for size in x.shape[1:])]


def test_a_served_model(tmp_path: Path) -> None:
    """Fused calls for an NPU that agree with the fake-quant graph; a folder that reads back."""
    model = make_model(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    recipe = {
        "name": "flat",
        "schemes": {"*": "W4A4"},
        "passes": [{"flatquant": {"epochs": 1}}, "insert-fake-quant", "quantize-weights"],
    }
    compiled = panguq.compile(
        model.to(torch.bfloat16), recipe, calibration=IDS, tokenizer=make_tokenizer(),
        target="ascend910b1",
    )  # fmt: skip
    kernels = [str(n.target) for n in compiled.graph.graph.nodes]
    assert kernels.count("npu.npu_kronecker_quant.default") == 4
    assert not any("kronecker" in name for name in kernels if not name.startswith("npu."))
    target = find_target("ascend910b1")
    (first, *_) = [n for n in compiled.graph.graph.nodes if "kronecker_quant" in str(n.target)]
    few, many = (node_cost(first, partial(with_rows, m), target) for m in (64, 6400))
    assert few is not None and many is not None and few.total_us < many.total_us
    compiled.save(tmp_path / "out", format="ascend")
    report = check_folder(tmp_path / "out")
    assert report.types["W4A4_FLATQUANT_DYNAMIC"] == 7
    assert report.servers["vllm-ascend"] == "takes" and report.servers["mindie"] == "refuses"
    name = "model.layers.0.self_attn.q_proj"  # its input is that of both, bit for bit
    read, found = load_ascend_v1(tmp_path / "out"), []
    read.get_submodule(name).register_forward_hook(lambda m, x, y: found.append((x[0], y)))
    read(IDS)
    fake = compiled.at_stage("fake-quant").graph
    matmul = find_label(fake, f"{name}:linear")
    x = operand(Linear.of(matmul).source, 0)
    assert torch.equal(found[0][1], region(fake, x, found[0][0], matmul))
    with pytest.raises(ExportError, match="W4A4"):
        compiled.save(tmp_path / "other", format="compressed-tensors")
