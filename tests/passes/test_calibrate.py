"""What calibration notes down, for whom, and that it changes no number."""

from __future__ import annotations

import pytest
import torch

from panguq.errors import InputError, NumericsError, RecipeError
from panguq.ir.edit import find_label, get_tensor, set_tensor, weights_of
from panguq.ir.node_meta import meta_of, range_of, scheme_of, statistics_of
from panguq.ir.run.interpret import values
from panguq.ir.text.printer import Hasher, print_graph
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.calibrate import Calibrate
from panguq.passes.pipeline.base import PassContext, linears
from panguq.passes.statistics.observers import OBSERVERS
from tests.model_shelf import FAMILIES, canonical, family_context


def calibrated(family: str, scheme: str, *options):
    gm, _ = canonical(family)
    ctx = family_context(family)
    AssignSchemes(schemes=(("*", scheme),)).run(gm, ctx)
    before = print_graph(gm, Hasher())
    result = Calibrate(*options).run(gm, ctx)
    assert print_graph(gm, Hasher()) == before
    return gm, ctx, result


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_are_those_of_a_plain_run(family) -> None:
    gm, ctx, result = calibrated(family, "W8A8")
    matmuls = [n for n in linears(gm) if not scheme_of(n).is_float]
    inputs = {n.args[0] for n in matmuls}
    seen = [values(gm, batch, inputs) for batch in ctx.batches]
    for node in matmuls:
        every = torch.cat([v[node.args[0]].flatten(0, -2) for v in seen])
        statistics = statistics_of(node)
        assert statistics.tokens == len(every) == 128
        assert torch.equal(statistics.channel_amax, every.abs().amax(0))
        torch.testing.assert_close(statistics.mean_square, every.square().mean(0))
        if statistics.plain_tokens == statistics.tokens:
            assert range_of(node) == (float(every.min()), float(every.max()))
    assert result.changed == len(matmuls)
    assert len(result.tables["ranges"].rows) == len(inputs)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_chosen_observer_reads_the_range(observer) -> None:
    gm, _, _ = calibrated("llama", "W8A8", observer, 99.0)
    for node in linears(gm):
        if scheme_of(node).is_float:
            continue
        histogram = statistics_of(node).histogram
        spec = scheme_of(node).activation
        assert range_of(node) == OBSERVERS[observer](histogram, spec, 99.0)


def test_siblings_share_what_was_seen() -> None:
    gm, _, _ = calibrated("llama", "W8A8")
    q, k, v = (find_label(gm, f"model.layers.0.self_attn.{x}_proj:linear") for x in "qkv")
    assert statistics_of(q) is statistics_of(k) is statistics_of(v)
    assert range_of(q) == range_of(k) == range_of(v)


def test_values_count_by_the_weights_they_meet() -> None:
    gm, _, _ = calibrated("llama", "W8A8")
    node = find_label(gm, "model.layers.0.mlp.down_proj:linear")
    weight = get_tensor(gm, str(node.args[1].target))
    energy = statistics_of(node).column_energy
    torch.testing.assert_close(energy, weight.square().sum(0))


@pytest.mark.parametrize("scheme", ["W8A8_DYNAMIC", "W8A16", "W4A16"])
def test_what_is_not_static_gets_statistics_and_no_range(scheme) -> None:
    gm, _, result = calibrated("llama", scheme)
    for node in linears(gm):
        quantized = not scheme_of(node).is_float
        assert (meta_of(node).input_statistics is not None) == quantized
        assert meta_of(node).input_range is None
    assert result.changed == 14
    assert all(row[6:] == ("", "", "") for row in result.tables["ranges"].rows)


def test_nothing_to_quantize_needs_no_data() -> None:
    gm, interface = canonical("llama")
    ctx = PassContext(interface, family_context("llama").store)
    AssignSchemes(schemes=(("*", "FLOAT"),)).run(gm, ctx)
    assert Calibrate().run(gm, ctx).changed == 0
    AssignSchemes(schemes=(("*", "W8A8"),)).run(gm, ctx)
    with pytest.raises(InputError, match="no calibration data"):
        Calibrate().run(gm, ctx)


@pytest.mark.parametrize("percentile", [50.0, 100.1, -1.0, float("nan")])
def test_wrong_percentiles_are_refused(percentile) -> None:
    with pytest.raises(RecipeError, match=r"must lie in \(50, 100\]"):
        Calibrate(observer="percentile", percentile=percentile)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_activation_that_overflows_is_named(bad) -> None:
    gm, _ = canonical("llama")
    ctx = family_context("llama")
    AssignSchemes(schemes=(("*", "W8A8"),)).run(gm, ctx)
    embedding = weights_of(gm)["model.embed_tokens.weight"].clone()
    embedding[int(ctx.batches[0]["input_ids"][0, 3])] = bad
    set_tensor(gm, "model.embed_tokens.weight", embedding)
    with pytest.raises(NumericsError, match=r"(weight model\.embed_tokens|activation model\.)"):
        Calibrate().run(gm, ctx)
