"""What traced equal layers once is what traced them all: a graph, and a plan, figure by figure."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import fx

from panguq import tracing
from panguq.equal_layers import NotEqualError, Pattern, pattern_of, short_model
from panguq.forecast import graph
from panguq.ir.edit import module_path, weights_of
from panguq.planning import dry_run
from panguq.planning.report import MatmulPlan, Plan
from tests.families.models import FAMILIES
from tests.model_shelf import canonical

PAIR = ["sliding_attention", "full_attention"]
DEEP: dict[str, dict[str, Any]] = {
    "llama": dict(num_hidden_layers=5),
    "cohere2": dict(num_hidden_layers=9, layer_types=[*PAIR * 4, PAIR[0]]),
}


@functools.cache
def deep(family: str) -> Any:
    settings = {**FAMILIES[family], **DEEP[family]}
    config = transformers.AutoConfig.for_model(family, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def planned(family: str) -> Plan:
    return dry_run.plan(deep(family), "w8a8")


def figures(plan: Plan) -> dict[str, Any]:
    return {key: value for key, value in plan.model_dump().items() if "seconds" not in key}


@pytest.mark.parametrize(("family", "traced"), [("llama", 3), ("cohere2", 7)])
def test_the_plan_is_that_of_all_layers(
    family: str, traced: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = short_model(deep(family))
    assert short is not None and short.pattern.kept == traced
    found = planned(family)
    monkeypatch.setattr(graph, "short_model", lambda *given: None)
    whole = dry_run.plan(deep(family), "w8a8")
    assert figures(found) == figures(whole)
    layers = len([name for name in found.inputs if name.startswith("past_key_")])
    assert layers == deep(family).config.num_hidden_layers


def test_a_layer_that_the_recipe_names_is_not_equal_to_others() -> None:
    recipe = {
        "schemes": {"*": "W8A16", "*.layers.1.mlp.*": "W4A16-g32"},
        "passes": ["insert-fake-quant", "quantize-weights"],
    }
    found = dry_run.plan(deep("llama"), recipe)
    fours = [row.name for row in found.matmuls if row.scheme.startswith("W4A16")]
    assert fours == [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert len(found.matmuls) == 5 * 7 + 1


def test_shares_count_every_expert() -> None:
    row: Any = dict(kernel=None, k=10)
    rows = (
        MatmulPlan(name="q", n=20, scheme="W8A16", **row),
        MatmulPlan(name="experts", n=10, scheme="W4A16", experts=8, **row),
    )
    found = planned("llama").model_copy(update={"matmuls": rows})
    assert found.shares == {"W4A16": 0.8, "W8A16": 0.2}
    assert "of all linear weights: 80.0% W4A16, 20.0% W8A16" in found.render()


def test_layers_that_were_traced_as_others_are_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def differ(*given: object) -> None:
        raise NotEqualError("they differ")

    expected = planned("llama")
    monkeypatch.setattr("panguq.equal_layers.copy_layers", differ)
    assert figures(dry_run.plan(deep("llama"), "w8a8")) == figures(expected)


def test_patterns() -> None:
    assert pattern_of(list("aaaaaa")) == Pattern(6, 1, 1)
    assert pattern_of(list("abbbbb")) == Pattern(6, 2, 1)
    assert pattern_of(list("aaabbbbb")) == Pattern(8, 4, 1)
    assert pattern_of(list("ssfssfssfssfss")) == Pattern(14, 3, 3)
    assert pattern_of(list("abcdef")) is None
    assert pattern_of(list("aaa")) is None  # the first, and two that are compared
    pattern = Pattern(14, 3, 3)
    assert (pattern.kept, pattern.copies) == (11, 1)
    assert [pattern.stands_for(i) for i in range(14)] == [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9, 10
    ]  # fmt: skip


def test_layers_of_two_sizes_are_not_equal() -> None:
    model = transformers.AutoModelForCausalLM.from_config(deep("llama").config)
    model.model.layers[2].mlp.up_proj = model.model.layers[2].mlp.down_proj
    assert short_model(model) is None


def test_a_graph_without_these_layers_stays_as_it_is() -> None:
    from panguq.equal_layers import copy_layers

    gm, interface = canonical("llama")
    before = str(gm.graph)
    with pytest.raises(NotEqualError):
        copy_layers(gm, interface, "model.blocks", Pattern(8, 0, 1))
    assert str(gm.graph) == before


def test_the_graph_is_that_of_all_layers_and_reads_their_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = deep("llama")
    gm, interface = tracing.trace(model, None, None)
    monkeypatch.setattr(tracing, "short_model", lambda model: None)
    whole, whole_interface = tracing.trace(model, None, None)
    assert interface == whole_interface
    assert spelled(gm) == spelled(whole)
    weights = dict(model.named_parameters())
    read = weights_of(gm)
    assert len([name for name in read if name.startswith("model.layers.")]) == 5 * 9
    for name, tensor in read.items():
        assert name not in weights or tensor.data_ptr() == weights[name].data_ptr()


def spelled(gm: Any) -> list[tuple[str, ...]]:
    """Every node without its name: where it is from, what it calls, and what it reads."""
    place = {node: f"%{at}" for at, node in enumerate(gm.graph.nodes)}
    return [
        (
            node.op,
            module_path(node),
            str(node.target),
            str(fx.map_arg((node.args, dict(node.kwargs)), place.__getitem__)),
        )
        for node in gm.graph.nodes
    ]


def test_a_layer_that_differs_by_its_number_alone_is_found_by_the_comparison(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = transformers.AutoModelForCausalLM.from_config(deep("llama").config).eval()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        scale = 2.0 if self.layer_idx == 4 else 1.0
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * scale

    for index, layer in enumerate(model.model.layers):
        layer.mlp.layer_idx = index
        layer.mlp.forward = forward.__get__(layer.mlp)
    with caplog.at_level("INFO", "panguq"):
        gm, _ = tracing.trace(model, None, None)
    assert "every layer is traced: the graph of LlamaForCausalLM does not compute" in caplog.text
    assert len([name for name in weights_of(gm) if name.startswith("model.layers.4.")]) == 9


def test_a_weight_that_two_layers_share_is_read_once(caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.AutoModelForCausalLM.from_config(deep("llama").config).eval()
    model.model.layers[4].mlp.up_proj.weight = model.model.layers[3].mlp.up_proj.weight
    with caplog.at_level("INFO", "panguq"):
        gm, _ = tracing.trace(model, None, None)
    assert "every layer is traced: two layers share a weight" in caplog.text
    assert len([name for name in weights_of(gm) if name.startswith("model.layers.")]) == 5 * 9 - 1
