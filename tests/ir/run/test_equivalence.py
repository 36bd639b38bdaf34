"""The proof of exact passes passes what is exact and catches what is not, by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from panguq.errors import NumericsError
from panguq.ir.edit import clone, get_tensor, set_tensor, weights_of
from panguq.ir.run.equivalence import _difference, prove_site, prove_whole
from panguq.ir.run.interpret import first_non_finite
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Region
from tests.model_shelf import (
    TwoLinears,
    canonical,
    family_context,
    run_pipeline,
    tiny_context,
    trace_tiny,
)


@functools.cache
def traced_chain(dtype: torch.dtype) -> fx.GraphModule:
    return trace_tiny(TwoLinears(8, 12, 8, norm=True).to(dtype), torch.randn(3, 5, 8).to(dtype))[0]


def chain(dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    return clone(traced_chain(dtype))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def scaled(gm: fx.GraphModule, name: str, factor: float | Tensor) -> fx.GraphModule:
    after = clone(gm)
    set_tensor(after, name, (get_tensor(gm, name).double() * factor).to(get_tensor(gm, name).dtype))
    return after


@dataclass(frozen=True)
class ScaleWeight(Pass):
    """A pass that claims to be exact, and scales one weight."""

    name: ClassVar[str] = "scale-weight"
    exact: ClassVar[bool] = True
    weight: str = "first.weight"
    factor: float = 2.0
    sites: tuple[Region, ...] = ()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        set_tensor(gm, self.weight, get_tensor(gm, self.weight) * self.factor)
        return PassResult(changed=1, sites=list(self.sites))


# --- the proof of a whole graph -----------------------------------------------------------------


def test_an_unchanged_graph_is_proved() -> None:
    assert prove_whole(chain(), chain(), generator()) == 0.0


@pytest.mark.parametrize("name", ["norm.weight", "norm.bias", "first.weight", "second.bias"])
def test_a_doubled_weight_is_caught(name) -> None:
    gm = chain()
    set_tensor(gm, "norm.bias", torch.rand(8))
    with pytest.raises(NumericsError, match=f"{name.split('.')[0]}:"):
        prove_whole(gm, scaled(gm, name, 2.0), generator())


@given(
    exponent=st.floats(-3.5, 0.0),
    name=st.sampled_from(["norm.weight", "first.weight", "second.weight"]),
    row=st.integers(0, 7),
)
def test_a_small_change_of_one_row_is_caught(exponent, name, row) -> None:
    """Far below what a forward pass would show, far above float32's rounding."""
    gm = chain()
    factor = torch.ones(get_tensor(gm, name).shape[0], dtype=torch.float64)
    factor[row] += 10**exponent
    shaped = factor.view(-1, *[1] * (get_tensor(gm, name).dim() - 1))
    with pytest.raises(NumericsError, match="rounding explains at most"):
        prove_whole(gm, scaled(gm, name, shaped), generator())


@given(st.lists(st.floats(0.1, 10.0), min_size=12, max_size=12))
def test_a_rewrite_that_is_exact_passes(factors) -> None:
    """relu(s * x) / s == relu(x) for s > 0, each weight rounded once: values between differ."""
    gm = chain()
    s = torch.tensor(factors, dtype=torch.float64)
    after = scaled(gm, "first.weight", s[:, None])
    after = scaled(scaled(after, "first.bias", s), "second.weight", 1 / s)
    region = (("norm:layer_norm",), ("second:linear",))
    assert prove_site(gm, after, *region, generator()) < 1e-5


def test_the_first_difference_is_named() -> None:
    """Later values differ too; the message names where it began."""
    gm = chain()
    with pytest.raises(NumericsError) as caught:
        prove_whole(gm, scaled(gm, "first.weight", 2.0), generator())
    assert caught.value.message.startswith("first:linear changed by")
    assert "not exact" in caught.value.hint


def test_the_bound_follows_the_weights_dtype() -> None:
    """One rounding to bfloat16 passes where the weights are bfloat16, and only there."""
    half, full = chain(torch.bfloat16), chain()
    nudged = 1 + 2.0**-7
    prove_whole(half, scaled(half, "first.weight", nudged), generator())
    with pytest.raises(NumericsError):
        prove_whole(full, scaled(full, "first.weight", nudged), generator())


def test_a_change_of_shape_is_caught() -> None:
    gm, after = chain(), chain()
    output = after.graph.output_node()
    last = output.args[0][0]
    with after.graph.inserting_before(output):
        shorter = after.graph.call_function(torch.ops.aten.slice.Tensor, (last, 0, 0, 1))
    shorter.meta.update(last.meta)
    output.args = ((shorter,),)
    with pytest.raises(NumericsError, match="changed by inf"):
        prove_whole(gm, after, generator())


# --- the proof of a site ------------------------------------------------------------------------


def test_a_site_sees_its_region_and_no_more() -> None:
    gm = chain()
    after = scaled(gm, "first.weight", 2.0)
    outside = (("first:linear",), ("second:linear",))
    assert prove_site(gm, after, *outside, generator()) == 0.0
    with pytest.raises(NumericsError, match="second:linear"):
        prove_site(gm, after, ("norm:layer_norm",), ("second:linear",), generator())


# --- through the runner -------------------------------------------------------------------------


def test_an_exact_pass_that_lies_is_stopped() -> None:
    gm, interface = trace_tiny(TwoLinears(8, 12, 8, norm=True), torch.randn(3, 5, 8))
    with pytest.raises(NumericsError) as caught:
        run_pipeline(gm, [ScaleWeight()], tiny_context(interface))
    assert "first:linear" in caught.value.message
    assert "first seen by pass 01 scale-weight" in caught.value.message


def test_an_exact_pass_that_lies_about_its_site_is_stopped() -> None:
    gm, interface = trace_tiny(TwoLinears(8, 12, 8, norm=True), torch.randn(3, 5, 8))
    site = Region(("norm:layer_norm",), ("second:linear",))
    with pytest.raises(NumericsError, match="second:linear changed"):
        run_pipeline(gm, [ScaleWeight(sites=(site,))], tiny_context(interface))


def test_an_exact_pass_that_tells_the_truth_passes() -> None:
    gm, interface = trace_tiny(TwoLinears(8, 12, 8, norm=True), torch.randn(3, 5, 8))
    records, _ = run_pipeline(gm, [ScaleWeight(factor=1.0)], tiny_context(interface))
    assert records[0].proved_difference == 0.0


@pytest.mark.parametrize("family", ["openpangu", "opt"])
def test_any_doubled_weight_of_a_language_model_is_caught(family) -> None:
    gm, _ = canonical(family)
    matrices = [name for name, tensor in weights_of(gm).items() if tensor.dim() == 2]
    for name in matrices[:: max(1, len(matrices) // 3)]:
        with pytest.raises(NumericsError):
            run_pipeline(clone(gm), [ScaleWeight(weight=name)], family_context(family))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_not_called_a_defect(bad) -> None:
    """The pass is innocent: the weight is named, and the first pass that saw it."""
    gm, interface = trace_tiny(TwoLinears(8, 12, 8, norm=True), torch.randn(3, 5, 8))
    set_tensor(gm, "first.weight", torch.full((12, 8), bad))
    with pytest.raises(NumericsError, match=r"weight first\.weight \[12, 8\] holds 96") as caught:
        run_pipeline(gm, [ScaleWeight(weight="second.weight", factor=1.0)], tiny_context(interface))
    assert "first seen by pass 01 scale-weight" in caught.value.message


class Masked(nn.Module):
    """Attention scores as much code masks them: with infinities."""

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2)
        mask = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(mask, float("-inf")).softmax(-1) @ x


def test_infinities_of_a_mask_are_equal() -> None:
    gm, interface = trace_tiny(Masked(), torch.randn(3, 5, 8))
    records, _ = run_pipeline(gm, [Canonicalize()], tiny_context(interface))
    assert records[0].proved_difference == 0.0
    assert first_non_finite(gm, {interface.inputs[0]: torch.randn(2, 4, 8)}) is None
    x = torch.full((2, 4, 8), 1e30)
    assert first_non_finite(gm, {interface.inputs[0]: x}) == "matmul"


def test_another_infinity_is_a_difference() -> None:
    x = torch.tensor([1.0, -torch.inf])
    assert _difference(x, x) == 0.0
    assert _difference(x, torch.tensor([1.0, torch.inf])) == torch.inf
    assert _difference(x, torch.tensor([-torch.inf, 1.0])) == torch.inf
    assert _difference(x, torch.tensor([2.0, -torch.inf])) == 1.0
    assert _difference(torch.tensor([torch.nan]), torch.tensor([torch.nan])) == torch.inf


def subnormal_chain() -> fx.GraphModule:
    """Its second linear is of a few steps of 2^-24, which is all that float16 has there."""
    gm = scaled(chain(torch.float16), "second.bias", 0.0)
    return scaled(gm, "second.weight", 2e-6)


def test_rounding_of_subnormal_weights_is_no_defect() -> None:
    """Columns up and down by a third: in float16 they are rounded by a tenth of themselves."""
    before = subnormal_chain()
    factor = torch.linspace(0.7, 1.4, 12, dtype=torch.float64)
    after = scaled(before, "second.weight", factor)
    after = scaled(after, "first.weight", (1 / factor)[:, None])
    after = scaled(after, "first.bias", 1 / factor)
    difference = prove_site(before, after, ("x",), ("second:linear",), generator())
    assert 16 * torch.finfo(torch.float16).eps < difference < 0.4


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.5])
def test_a_wrong_rewrite_of_subnormal_weights_is_found(factor: float) -> None:
    before = subnormal_chain()
    with pytest.raises(NumericsError, match=r"second:linear changed by .* rounding explains"):
        prove_whole(before, scaled(before, "second.weight", factor), generator())


def test_subnormal_weights_that_were_not_rewritten_excuse_nothing() -> None:
    before = subnormal_chain()
    with pytest.raises(NumericsError, match=r"first:linear changed .* explains at most 0\.0156"):
        prove_whole(before, scaled(before, "first.weight", 1.1), generator())
