"""A pass that chooses scales leaves its statistics to `calibrate`, which then needs no sweep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

from panguq.ir.edit import label
from panguq.ir.input_statistics import InputStatistics
from panguq.ir.node_meta import is_quantized, statistics_of
from panguq.passes import calibrate
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.awq import Awq
from panguq.passes.calibrate import Calibrate
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, matmuls
from panguq.passes.pipeline.runner import Runner
from panguq.passes.scaling.sites import ScaleSites
from panguq.passes.smoothquant import SmoothQuant
from tests.model_shelf import EXPERTS, canonical, family_context

NORMS = ("norm_linear",)


def seen_by_calibrate(
    scheme: str, *passes: Pass, family: str = "llama", together: bool = True
) -> dict[str, InputStatistics]:
    """By label of the matmul; the passes run in one go, or each as if it were alone."""
    gm, _ = canonical(family)
    runner = Runner(family_context(family))
    before = AssignSchemes(schemes=(("*", scheme),))
    assert runner.ctx.statistics is None
    runner.held |= before.requires
    for some in [(before, *passes)] if together else [(step,) for step in (before, *passes)]:
        runner.run(gm, some)
    return {label(n): statistics_of(n) for n in filter(is_quantized, matmuls(gm))}


@pytest.fixture
def sweeps(monkeypatch) -> list[fx.GraphModule]:
    """The sweeps that `calibrate` made."""
    made: list[fx.GraphModule] = []
    whole = calibrate.sweep

    def counted(gm, *rest) -> None:
        made.append(gm)
        whole(gm, *rest)

    monkeypatch.setattr(calibrate, "sweep", counted)
    return made


@pytest.mark.parametrize(
    ("scheme", "scales"),
    [
        ("W8A8", SmoothQuant(alpha=0.8, sites=NORMS)),
        ("W8A8_DYNAMIC", SmoothQuant(statistic="rms")),
        ("W4A16-g32", Awq(steps=4)),
    ],
)
def test_calibrate_sees_without_a_sweep_what_one_would_have_shown(sweeps, scheme, scales) -> None:
    shared = seen_by_calibrate(scheme, scales, Calibrate())
    assert not sweeps
    own = seen_by_calibrate(scheme, scales, Calibrate(), together=False)
    assert len(sweeps) == 1
    assert shared.keys() == own.keys()
    for name, seen in own.items():
        assert (shared[name].tokens, shared[name].plain_tokens) == (seen.tokens, seen.plain_tokens)
        for what in ("channel_amax", "plain_amax", "mean_square", "plain_mean_square"):
            torch.testing.assert_close(getattr(shared[name], what), getattr(seen, what))
        if seen.column_energy is not None:
            torch.testing.assert_close(shared[name].column_energy, seen.column_energy)
            low_high = (shared[name].histogram.low, shared[name].histogram.high)
            assert low_high == pytest.approx((seen.histogram.low, seen.histogram.high), rel=1e-5)
            counts = shared[name].histogram.counts.sum()
            torch.testing.assert_close(counts, seen.histogram.counts.sum())


def test_a_static_scheme_with_scaled_rows_is_swept_again(sweeps) -> None:
    """What an error in the input of `v_proj` costs is known once the scale behind it is."""
    seen_by_calibrate("W8A8", SmoothQuant(), Calibrate())
    assert len(sweeps) == 1


def test_experts_are_swept_again(sweeps) -> None:
    seen_by_calibrate("W8A8_DYNAMIC", SmoothQuant(sites=NORMS), Calibrate(), family=EXPERTS)
    assert len(sweeps) == 1


def test_two_passes_of_scales_share_the_sweep_of_the_second(sweeps) -> None:
    first, second = SmoothQuant(sites=NORMS), SmoothQuant(sites=("value_output", "up_down"))
    shared = seen_by_calibrate("W8A8_DYNAMIC", first, second, Calibrate())
    assert not sweeps
    own = seen_by_calibrate("W8A8_DYNAMIC", first, second, Calibrate(), together=False)
    for name, seen in own.items():
        torch.testing.assert_close(shared[name].channel_amax, seen.channel_amax)


class Other(Pass):
    """Changes nothing, and could have changed anything."""

    name = "other"

    def run(self, gm, ctx):
        return PassResult()


def test_statistics_are_those_of_the_graph_as_it_is(sweeps) -> None:
    scales = SmoothQuant(sites=NORMS)
    seen_by_calibrate("W8A8_DYNAMIC", scales, Other(), Calibrate())
    assert len(sweeps) == 1


def test_every_pass_knows_which_one_follows() -> None:
    gm, _ = canonical("llama")
    seen: list[Pass | None] = []

    class Asks(Other):
        def run(self, gm, ctx):
            seen.append(ctx.following)
            return PassResult()

    runner = Runner(family_context("llama"))
    assert runner.run(gm, ()) == []
    last = Other()
    runner.run(gm, (Asks(), last))
    runner.run(gm, (Asks(),))
    assert seen == [last, None]


def test_nothing_is_gathered_for_nobody() -> None:
    gm, _ = canonical("llama")
    ctx: PassContext = replace(family_context("llama"))
    AssignSchemes(schemes=(("*", "W8A8"),)).run(gm, ctx)
    step: ScaleSites = SmoothQuant(sites=NORMS)
    step.run(gm, ctx)
    assert ctx.statistics is None
