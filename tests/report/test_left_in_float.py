"""What a recipe was to quantize and could not is said, in the log, the report and the dry run."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import panguq
from panguq.ir.edit import label, module_path
from panguq.ir.node_meta import annotate
from panguq.ir.quant_spec import SCHEMES
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.pipeline.base import PassResult, linears
from panguq.report.left_in_float import left_in_float
from tests.model_shelf import canonical, tiny_context


def chain(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    steps = (nn.Sequential(nn.Linear(k, n), nn.ReLU()) for k, n in pairwise(sizes))
    return nn.Sequential(*steps)


def warnings_of(model: nn.Module, recipe: Any, k: int, **options: Any) -> tuple[str, ...]:
    inputs = (torch.randn(4, k, dtype=next(model.parameters()).dtype),)
    compiled = panguq.compile(model, recipe, example_inputs=inputs, **options)
    plan = panguq.plan(model, recipe, example_inputs=inputs, **options)
    found = compiled.report.warnings
    assert plan.warnings == found
    assert all(f"warning: {warning}" in plan.render() for warning in found)
    return found


def test_a_size_that_no_group_divides_is_listed_with_its_matmuls(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="panguq"):
        found = warnings_of(chain(64, 40, 40, 8), "w4a16", 64)
    assert found == (
        "2 of 3 matmuls stay float: none of the group sizes 128, 64, 32 divides k = 40: 1.0, 2.0",
    )
    assert caplog.messages.count(found[0]) == 1


def test_a_recipe_that_quantizes_nothing_says_so_first() -> None:
    found = warnings_of(chain(40, 50, 8), "w4a16", 40)
    assert found[0] == (
        "the recipe quantizes nothing of this model: all of its 2 matmuls stay float"
    )
    assert [text.rpartition(": ")[2] for text in found[1:]] == ["0.0", "1.0"]


def test_what_a_later_pass_gave_up_counts_too_and_layers_share_a_line() -> None:
    """As fit-schemes does where the target has no kernel for a shape."""
    gm, interface = canonical("llama")
    assign = AssignSchemes(schemes=(("*", "W4A8"),))
    results = [assign.run(gm, tiny_context(interface)), PassResult()]
    for node in linears(gm):
        if module_path(node).endswith("down_proj"):
            annotate(node, scheme=SCHEMES["FLOAT"])
            results[1].skip(node, f"W4A8 -> FLOAT: no kernel fits {label(node)}")
    assert left_in_float(gm, assign, results) == [
        "2 of 15 matmuls stay float: W4A8 -> FLOAT: no kernel fits "
        "model.layers.*.mlp.down_proj:linear: model.layers.*.mlp.down_proj (2)"
    ]


@pytest.mark.parametrize("schemes", [{"*": "FLOAT"}, {"*": "W8A16", "0.0": "FLOAT"}])
def test_what_the_recipe_wants_in_float_is_no_warning(schemes: dict[str, str]) -> None:
    recipe = {"schemes": schemes, "passes": ["insert-fake-quant", "quantize-weights"]}
    assert warnings_of(chain(64, 64, 8), recipe, 64) == ()
