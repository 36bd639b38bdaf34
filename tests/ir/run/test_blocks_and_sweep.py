"""Cuts lie on the residual stream; a sweep shows what a plain run computes, block by block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from panguq.errors import NumericsError
from panguq.ir.analysis.blocks import blocks, cuts
from panguq.ir.edit import label, set_tensor
from panguq.ir.run import sweep as sweep_module
from panguq.ir.run.interpret import run, values
from panguq.ir.run.sweep import sweep
from panguq.passes.pipeline.base import linears, no_progress
from tests.model_shelf import FAMILIES, Residual, canonical, family_context, trace_tiny


class Tapped(Residual):
    """The same, but the head also reads the first input: nothing carries everything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.head(x)


def test_cuts_are_the_residual_stream() -> None:
    gm, _ = trace_tiny(Residual(4), torch.randn(3, 4))
    assert [label(n) for n in cuts(gm)] == ["add", "add.1", "head:linear"]


def test_a_tapped_residual_is_no_cut() -> None:
    gm, _ = trace_tiny(Tapped(4), torch.randn(3, 4))
    assert [label(n) for n in cuts(gm)] == [label(gm.graph.output_node().args[0][0])]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_ends_in_a_cut(family) -> None:
    """Attention and MLP of two layers add to the stream: at least four cuts and the head."""
    gm, _ = canonical(family)
    found = cuts(gm)
    sums = [n for n in found if n.target is torch.ops.aten.add.Tensor]
    assert len(sums) >= 4
    assert label(found[-1]) == "lm_head:linear"
    per_block = [sum(n in linears(gm) for n in block) for block in blocks(gm)]
    assert max(per_block) <= 4  # q, k, v, o of one layer and no more


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_hold_every_computing_node_once_and_in_order(family) -> None:
    gm, _ = canonical(family)
    flat = [n for block in blocks(gm) for n in block]
    assert flat == [n for n in gm.graph.nodes if n.op in ("call_function", "get_attr")]


def test_a_graph_without_a_path_is_one_block() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * 2

    gm, _ = trace_tiny(Constant(), torch.randn(3, 4))
    assert (cuts(gm), len(blocks(gm))) == ([], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_shows_what_a_run_computes(family) -> None:
    gm, _ = canonical(family)
    ctx = family_context(family, sequences=3, tokens=10)
    watch = {n.args[0] for n in linears(gm)}
    seen: dict[tuple[str, int], Tensor] = {}
    counts = dict.fromkeys(watch, 0)

    def observe(node, value) -> None:
        seen[label(node), counts[node]] = value.clone()
        counts[node] += 1

    sweep(gm, ctx.batches, watch, observe, no_progress)
    assert set(counts.values()) == {3}
    for index, batch in enumerate(ctx.batches):
        for node, expected in values(gm, batch, watch).items():
            assert torch.equal(seen[label(node), index], expected)


def test_a_watched_input_is_shown_too() -> None:
    gm, interface = trace_tiny(Residual(4), torch.randn(3, 4))
    batches = [{interface.inputs[0]: torch.randn(2, 4)} for _ in range(3)]
    seen: list[Tensor] = []
    watch = {linears(gm)[0].args[0]}
    sweep(gm, batches, watch, lambda node, value: seen.append(value), no_progress)
    assert [next(iter(b.values())) is x for b, x in zip(batches, seen, strict=True)] == [True] * 3


def test_a_sweep_runs_a_block_over_all_batches_before_the_next(monkeypatch) -> None:
    """Each weight is read once however many batches there are, and the head never."""
    gm, interface = trace_tiny(Residual(4), torch.randn(3, 4))
    read: list[str] = []
    compute = sweep_module.compute

    def spy(gm, node, environment):
        read.append(label(node))
        return compute(gm, node, environment)

    monkeypatch.setattr(sweep_module, "compute", spy)
    batches = [{interface.inputs[0]: torch.randn(2, 4)} for _ in range(3)]
    steps: list[tuple[int, int]] = []
    watch = {n.args[0] for n in linears(gm)[:2]}
    sweep(gm, batches, watch, lambda n, v: None, lambda what, done, of: steps.append((done, of)))
    assert [name for name in read if name.endswith("weight")] == ["a.weight"]
    assert read.count("a:linear") == 3
    assert "b:linear" not in read and "head:linear" not in read
    assert steps[-1] == (1, 1)


def test_a_sweep_holds_one_blocks_values(monkeypatch) -> None:
    """Between blocks only what later blocks read is kept."""
    gm, interface = trace_tiny(Residual(4), torch.randn(3, 4))
    largest = 0
    compute = sweep_module.compute

    def spy(gm, node, environment):
        nonlocal largest
        live = [n for n in environment if n.op == "call_function"]
        largest = max(largest, len(live))
        return compute(gm, node, environment)

    monkeypatch.setattr(sweep_module, "compute", spy)
    watch = {linears(gm)[-1].args[0]}
    sweep(gm, [{interface.inputs[0]: torch.randn(2, 4)}], watch, lambda n, v: None, no_progress)
    assert largest == 2  # the stream and one value beside it


# --- what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad) -> None:
    gm, interface = trace_tiny(Residual(4), torch.randn(3, 4))
    set_tensor(gm, "b.weight", torch.full((4, 4), bad))
    batch = {interface.inputs[0]: torch.randn(2, 4)}
    watch = {linears(gm)[-1].args[0]}
    with pytest.raises(NumericsError, match=r"weight b\.weight \[4, 4\] holds 16 values"):
        sweep(gm, [batch], watch, lambda n, v: None, no_progress)
    run(gm, batch)  # what does not look does not complain
    sweep(gm, [batch], {linears(gm)[0].args[0]}, lambda n, v: None, no_progress)


def test_an_activation_that_is_not_finite_is_named() -> None:
    gm, interface = trace_tiny(Residual(4), torch.randn(3, 4))
    x = torch.randn(2, 4)
    x[1, 2] = float("inf")
    watch = {linears(gm)[1].args[0]}
    with pytest.raises(NumericsError, match=r"activation add \[2, 4\] holds"):
        sweep(gm, [{interface.inputs[0]: x}], watch, lambda n, v: None, no_progress)


def test_a_sum_that_overflows_is_no_fault() -> None:
    """Finite values whose sum is not finite are fine."""
    gm, interface = trace_tiny(Residual(4), torch.randn(3, 4))
    set_tensor(gm, "a.bias", torch.full((4,), 3e38))
    batch = {interface.inputs[0]: torch.zeros(2, 4)}
    sweep(gm, [batch], {linears(gm)[1].args[0]}, lambda n, v: None, no_progress)
