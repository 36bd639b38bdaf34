"""decoupled-smoothquant: exponents apart, by the block's error, and the same function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from panguq.errors import InputError, RecipeError
from panguq.ir.edit import clone, get_tensor
from panguq.ir.run.interpret import run
from panguq.passes.calibrate import Calibrate
from panguq.passes.decoupled_smoothquant import DecoupledSmoothQuant
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.pipeline.base import Pass, PassContext
from panguq.passes.quantize_weights import QuantizeWeights
from tests.model_shelf import (
    TwoLinears,
    canonical,
    family_context,
    normal_weights,
    run_passes,
    tiny_context,
    trace_tiny,
)

APART = DecoupledSmoothQuant()


def outlying(k: int) -> list[Tensor]:
    """Channels of very different sizes, one of them dead."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-1, 2, k)
    sizes[3] = 0.0
    return [torch.randn(24, k, generator=generator) * sizes for _ in range(3)]


def two(*batches: Tensor) -> tuple[fx.GraphModule, PassContext]:
    model: nn.Module = normal_weights(TwoLinears(16, 32, 8, norm=True))
    gm, interface = trace_tiny(model, torch.randn(3, 16))
    return gm, tiny_context(interface, *batches)


def error(gm: fx.GraphModule, ctx: PassContext, *passes: Pass) -> float:
    """The mean over tokens of the output's squared error over its square, all quantized."""
    wanted = [run(gm, batch)[0] for batch in ctx.batches]
    quantized = clone(gm)
    run_passes(quantized, ctx, "W8A8", *passes, Calibrate(), InsertFakeQuant(), QuantizeWeights())
    found = [run(quantized, batch)[0] for batch in ctx.batches]
    errors = [
        (a - b).square().sum(-1) / b.square().sum(-1) for a, b in zip(found, wanted, strict=True)
    ]
    return float(torch.cat(errors).mean())


def rows(gm: fx.GraphModule, ctx: PassContext, step: Pass = APART) -> list[dict[str, object]]:
    table = run_passes(gm, ctx, "W8A8", step)[2].result.tables["scales"]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_block_loses_less_and_the_table_says_with_what() -> None:
    gm, ctx = two(*outlying(16))
    plain = error(gm, ctx)
    assert error(gm, ctx, APART) < plain
    found = rows(clone(gm), ctx)
    assert any(row["p"] != row["q"] != 0 for row in found)
    for row in found:
        assert row["block_db_after"] < row["block_db_before"]


def test_the_scale_is_its_formula() -> None:
    """The norm's weight is divided by a_j^p / w_j^q, plain tokens counted."""
    gm, ctx = two(*outlying(16))
    norm, bias, weight = (
        get_tensor(gm, name).clone() for name in ("norm.weight", "norm.bias", "first.weight")
    )
    changed = clone(gm)
    (row,) = [row for row in rows(changed, ctx) if row["kind"] == "norm_linear"]
    normed = [
        torch.nn.functional.layer_norm(next(iter(batch.values())), (16,), norm, bias)
        for batch in ctx.batches
    ]
    act = torch.cat(normed).abs().amax(0).double()
    scale = act ** row["p"] / weight.abs().amax(0).double() ** row["q"]
    expected = (norm / torch.where(act == 0, 1.0, scale)).float()
    torch.testing.assert_close(get_tensor(changed, "norm.weight"), expected, rtol=1e-4, atol=0)


def test_zeros_alone_are_left_alone() -> None:
    gm, ctx = two(torch.zeros(4, 16))
    assert error(gm, ctx, APART) <= error(gm, ctx)


def test_a_decoder_and_what_is_refused() -> None:
    gm, _ = canonical("llama")
    ctx = replace(family_context("llama"))
    found = rows(gm, ctx, replace(APART, batches=1, rounds=1))
    kinds = {row["kind"] for row in found}
    assert kinds == {"norm_linear", "value_output", "up_down"}
    assert all(row["block_db_after"] <= row["block_db_before"] for row in found)
    gm, _ = canonical("llama")
    result = run_passes(gm, ctx, "W4A16", APART)[2].result
    assert result.changed == 0
    assert "an input of a matmul that reads it stays float" in {s.reason for s in result.skipped}
    with pytest.raises(InputError, match="no calibration data"):
        run_passes(gm, replace(ctx, batches=()), "W8A8", APART)
    with pytest.raises(RecipeError, match="rounds 0 must be at least 1"):
        DecoupledSmoothQuant(rounds=0)
    with pytest.raises(RecipeError, match="unknown kind of site"):
        DecoupledSmoothQuant(sites=("norm_linar",))
