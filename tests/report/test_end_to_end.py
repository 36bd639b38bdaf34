"""The whole model is compared at the end of a compile: figures, warnings, and what is an error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx, nn

import panguq
from panguq.compiled_module import CompiledModule
from panguq.data.calibration_data import read_calibration
from panguq.data.inputs import prepare
from panguq.errors import LoweringError, NumericsError
from panguq.evaluation import evaluate, logits_of
from panguq.ir.edit import call, clone, get_tensor, set_tensor
from panguq.lowering.choice import Choice
from panguq.lowering.cpu import calls as cpu_calls
from panguq.report.end_to_end import (
    NOT_OBSERVED,
    OBSERVED,
    Graphs,
    Outcome,
    check_end_to_end,
    other_kernel,
)
from tests.model_folders import TEXT, make_tokenizer
from tests.model_shelf import shared_model, token_ids

IDS = token_ids(4, 32)


@pytest.fixture(scope="module")
def float_graph() -> fx.GraphModule:
    return panguq.compile(shared_model("llama"), "float").stages["fake-quant"]


@pytest.fixture(scope="module")
def compiled() -> CompiledModule:
    return panguq.compile(shared_model("llama"), "w8a8", calibration=IDS)


def checked(reference: fx.GraphModule, compiled: CompiledModule, lowered=None, local=()) -> Outcome:
    graphs = Graphs(
        reference,
        compiled.stages["fake-quant"],
        lowered or compiled.stages["lowered"],
        compiled.interface,
        compiled.interface,
    )
    batches = [prepare(compiled.interface, row[None]) for row in IDS]
    return check_end_to_end(graphs, batches, (), True, dict(local))


# --- figures ------------------------------------------------------------------------------------


def test_the_figures_are_those_of_an_evaluation(compiled) -> None:
    found = compiled.report.end_to_end
    wanted = evaluate(
        {"it": logits_of(compiled)},
        torch.cat((IDS, IDS[:, :1]), 1),  # an evaluation does not score the last token
        against=logits_of(shared_model("llama")),
    )["it"]
    assert (found.rows, found.tokens, found.source) == (4, 128, OBSERVED)
    assert found.kl == pytest.approx(wanted["kl"], rel=0.02)
    assert found.top1 == pytest.approx(wanted["top1"], abs=1 / 128)
    expected = logits_of(shared_model("llama"))(IDS)
    noise = (expected - compiled(IDS).logits).square().sum()
    db = 10 * math.log10(expected.square().sum() / noise)
    assert found.sqnr_db == pytest.approx(db, abs=0.2) and 20 < db < 40
    assert not compiled.report.warnings
    assert f"SQNR {found.sqnr_db:.1f} dB" in str(found)


def test_a_float_compile_is_exact() -> None:
    found = panguq.compile(shared_model("llama"), "float", calibration=IDS).report.end_to_end
    assert (found.sqnr_db, found.kl, found.top1) == (999.0, 0.0, 1.0)
    assert found.source == NOT_OBSERVED


def test_a_cache_of_codes_is_measured_with_it() -> None:
    report = panguq.compile(shared_model("llama"), "w8a8-dynamic-kv8", calibration=IDS).report
    assert 20 < report.end_to_end.sqnr_db < 40


def test_text_behind_the_calibration_is_held_out() -> None:
    """Rows that no pass has seen, wherever there are any."""
    tokenizer = make_tokenizer()
    whole = tokenizer(TEXT).input_ids
    data = read_calibration(TEXT, tokenizer, window=16, windows=2)
    taken = [token for row in data.sequences for token in row.ids[0].tolist()]
    behind = [token for row in data.held_out for token in row.tolist()]
    assert (len(taken), len(behind)) == (32, 64)
    assert whole[: 32 + 64] == taken + behind
    assert not read_calibration(TEXT, tokenizer, window=512, windows=16).held_out


def test_a_plain_module_has_an_sqnr_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    x = torch.randn(8, 64)
    compiled = panguq.compile(model, "w8a8-dynamic", example_inputs=(x,), calibration=[x, x + 1])
    found = compiled.report.end_to_end
    assert (found.rows, found.tokens, found.kl, found.top1) == (2, None, None, None)
    given = torch.cat((x, x + 1))
    noise = (model(given) - compiled(given)).square().sum()
    db = 10 * math.log10(model(given).square().sum() / noise)
    assert found.sqnr_db == pytest.approx(db, abs=0.3)


# --- warnings and errors ------------------------------------------------------------------------


def test_a_collapse_is_said_with_the_first_broken_matmul(float_graph) -> None:
    """Here no matmul alone is below 5 dB: the first is named whose result is, all in a row."""
    compiled = panguq.compile(shared_model("llama"), "w2a16", calibration=IDS)
    report = compiled.report
    assert report.end_to_end.sqnr_db < 5 < min(m.local_sqnr_db for m in report.matmuls)
    assert "the compiled model keeps only" in report.warnings[0]
    first = report.warnings[0].partition("the first broken matmul is ")[2].partition(";")[0]
    assert first in [m.name for m in report.matmuls if "layers.0.self_attn" not in m.name]
    outcome = checked(float_graph, compiled, local={"fine": 9.0, "broken": 4.0, "later": 1.0})
    assert "the first broken matmul is broken;" in outcome.warnings[0]


def test_a_kernel_that_computes_something_else_is_an_error(float_graph, compiled) -> None:
    assert checked(float_graph, compiled).fault is None
    lowered = clone(compiled.stages["lowered"])
    name = "model.layers.1.mlp.up_proj.weight_codes"
    set_tensor(lowered, name, get_tensor(lowered, name).flip(0))
    fault = checked(float_graph, compiled, lowered).fault
    assert isinstance(fault, LoweringError)
    assert "the first matmul that differs is model.layers.1.mlp.up_proj" in fault.message


def test_the_noise_of_a_kernel_alone_is_told_from_the_schemes() -> None:
    assert other_kernel({"a": 21.6, "b": 45.0}, {"a": 21.0, "b": 39.0}) is None
    fault = other_kernel({"a": 21.6, "b": 45.0}, {"a": 21.6, "b": 12.0})
    assert fault is not None and fault.message.startswith("b keeps 12.0 dB")


def test_nan_is_an_error_that_names_its_node(float_graph, compiled) -> None:
    lowered = clone(compiled.stages["lowered"])
    name = "model.layers.0.mlp.down_proj.weight_scale"
    set_tensor(lowered, name, get_tensor(lowered, name) * math.inf)
    fault = checked(float_graph, compiled, lowered).fault
    assert isinstance(fault, NumericsError)
    assert "the compiled model yields NaN or Inf: first at model.layers.0.mlp.down" in fault.message


def test_what_is_wrong_ends_the_compile(monkeypatch) -> None:
    """By the path that every compile takes: a lowering that turns the sign of a scale."""
    right = cpu_calls._LOWERINGS["int8_weight_linear"]

    def wrong(node: fx.Node, choice: Choice) -> fx.Node:
        lowered = right(node, choice)
        x, codes, scale, *rest = lowered.args
        scale = call(lowered, torch.ops.aten.neg.default, (scale,), origin=node, suffix=".neg")
        lowered.args = (x, codes, scale, *rest)
        return lowered

    monkeypatch.setitem(cpu_calls._LOWERINGS, "int8_weight_linear", wrong)
    with pytest.raises(LoweringError, match=r"q_proj:linear keeps -6\.0 dB .* once it is lowered"):
        panguq.compile(shared_model("llama"), "w8a16", calibration=IDS)
