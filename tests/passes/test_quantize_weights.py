"""Codes are round-to-nearest against a slow reference, packed, and shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.edit import find_label, get_tensor, weights_of
from panguq.ir.node_meta import scheme_of, statistics_of
from panguq.ir.ops.packing import unpack_int4
from panguq.ir.run.interpret import run, values
from panguq.ir.text.printer import print_graph
from panguq.passes.calibrate import Calibrate
from panguq.passes.codes.weight_scales import clip_ratios, search_scale
from panguq.passes.insert_fake_quant import InsertFakeQuant
from panguq.passes.quantize_weights import QuantizeWeights
from tests.model_shelf import OneLinear, run_passes, tiny_context, trace_tiny

SCHEMES = ("W8A8", "W8A16", "W4A16", "W4A16-g32", "W4A16_ASYM", "W4A16-per_channel")


def quantized(scheme: str, step: QuantizeWeights | None = None, k: int = 128) -> fx.GraphModule:
    gm, interface = trace_tiny(OneLinear(k, 5), torch.randn(3, k))
    x = torch.randn(64, k, generator=torch.Generator().manual_seed(1))
    steps = (Calibrate(), InsertFakeQuant(), *([step] if step else []))
    run_passes(gm, tiny_context(interface, x), scheme, *steps)
    return gm


def obvious_codes(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> list[list[int]]:
    """One weight at a time, in plain Python, ties to even."""
    n, k = weight.shape
    size = k // scale.shape[1]
    rows = []
    for i in range(n):
        row = []
        for j in range(k):
            step = float(scale[i, j // size])
            offset = 0 if zero is None else int(zero[i, j // size])
            code = round(float(torch.tensor(float(weight[i, j])) / step)) + offset
            row.append(max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, code)))
        rows.append(row)
    return rows


def stored_codes(gm: fx.GraphModule) -> Tensor:
    codes = weights_of(gm)["fc.weight_codes"]
    return unpack_int4(codes) if codes.dtype == torch.uint8 else codes


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("search", [False, True])
def test_codes_are_the_obvious_ones(scheme, search) -> None:
    gm = quantized(scheme, QuantizeWeights(clip_search=search))
    found = weights_of(gm)
    codes = obvious_codes(
        OneLinear(128, 5).fc.weight.detach(),
        found["fc.weight_scale"], found.get("fc.weight_zero_point"),
        8 if scheme.startswith("W8") else 4,
    )  # fmt: skip
    assert stored_codes(gm).tolist() == codes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_storing_codes_changes_no_value(scheme) -> None:
    """The fake-quant graph computes the same from stored codes as from the float weight."""
    before, after = quantized(scheme), quantized(scheme, QuantizeWeights())
    x = {"x": torch.randn(7, 128)}
    assert torch.equal(run(before, x)[0], run(after, x)[0])


@pytest.mark.parametrize(
    ("scheme", "dtype", "shape"),
    [
        ("W8A8", torch.int8, (5, 128)),
        ("W8A16", torch.int8, (5, 128)),
        ("W4A16", torch.uint8, (5, 64)),
        ("W4A16_ASYM", torch.uint8, (5, 64)),
    ],
)
def test_codes_are_packed_and_the_float_weight_is_gone(scheme, dtype, shape) -> None:
    found = weights_of(quantized(scheme, QuantizeWeights()))
    assert (found["fc.weight_codes"].dtype, found["fc.weight_codes"].shape) == (dtype, shape)
    assert "fc.weight" not in found


def test_a_group_size_that_does_not_divide() -> None:
    gm = quantized("W4A16", QuantizeWeights(), k=576)
    found = weights_of(gm)
    assert found["fc.weight_scale"].shape == (5, 9)
    stored = sum(found[name].numel() * found[name].element_size() for name in
                 ("fc.weight_codes", "fc.weight_scale"))  # fmt: skip
    assert stored <= 0.6 * 5 * 576


def test_the_search_weighs_by_activations() -> None:
    gm = quantized("W4A16", QuantizeWeights(clip_search=True))
    matmul = find_label(gm, "fc:linear")
    statistics, spec = statistics_of(matmul), scheme_of(matmul).weight
    weight = OneLinear(128, 5).fc.weight.detach()
    wanted, _ = search_scale(weight, 128, spec, statistics.mean_square, clip_ratios())
    assert torch.equal(weights_of(gm)["fc.weight_scale"], wanted)
    plain = quantized("W4A16", QuantizeWeights(clip_search=True, importance="none"))
    unweighted, _ = search_scale(weight, 128, spec, None, clip_ratios())
    assert torch.equal(weights_of(plain)["fc.weight_scale"], unweighted)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM"])
def test_the_search_lowers_the_matmuls_error(scheme) -> None:
    """Not only the weights': the output on the calibration data."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    wanted = OneLinear(128, 5)(x).detach()
    plain, searched = (
        (run(quantized(scheme, QuantizeWeights(clip_search=s)), {"x": x})[0] - wanted)
        .square()
        .sum()
        for s in (False, True)
    )
    assert searched < plain


def test_the_table() -> None:
    gm, interface = trace_tiny(OneLinear(128, 5), torch.randn(3, 128))
    records = run_passes(
        gm, tiny_context(interface, torch.randn(64, 128)), "W4A16", InsertFakeQuant(),
        QuantizeWeights(clip_search=True, importance="none"),
    )  # fmt: skip
    table = records[-1].result.tables["weights"]
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["weight"], row["bits"], row["group_size"]) == ("fc:linear", 4, 128)
    matmul = find_label(gm, "fc:linear")
    weight = OneLinear(128, 5).fc.weight.detach()
    noise = values(gm, {}, [matmul.args[1]])[matmul.args[1]] - weight
    expected = 10 * torch.log10(weight.square().sum() / noise.square().sum())
    assert row["weight_sqnr_db"] == pytest.approx(float(expected), abs=1e-3)
    assert get_tensor(gm, "fc.weight_scale").dtype == torch.bfloat16


def test_nothing_to_quantize_is_left_alone() -> None:
    gm, interface = trace_tiny(OneLinear(128, 5), torch.randn(3, 128))
    before = print_graph(gm)
    assert QuantizeWeights().run(gm, tiny_context(interface)).changed == 0
    assert print_graph(gm) == before


@pytest.mark.parametrize(
    "options", [{"smallest_ratio": 0.0}, {"smallest_ratio": 1.1}, {"steps": 0}]
)
def test_wrong_options_are_refused(options) -> None:
    with pytest.raises(RecipeError, match="quantize-weights"):
        QuantizeWeights(clip_search=True, **options)


def test_the_grid_of_ratios() -> None:
    assert clip_ratios(steps=1) == (1.0,)
    assert clip_ratios(smallest_ratio=0.5, steps=3) == (1.0, 0.75, 0.5)
