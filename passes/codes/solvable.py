"""Whether a method that takes neither experts nor every width can choose a graph's codes."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from panguq.errors import RecipeError
from panguq.ir.edit import label, module_path
from panguq.ir.node_meta import scheme_of
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.views import ExpertLinear
from panguq.passes.pipeline.base import matmuls


def check_solvable(
    name: str, gm: fx.GraphModule, check_spec: Callable[[str, QuantSpec], None]
) -> None:
    """Raises RecipeError for a quantized matmul of experts, whose solutions the method called
    `name` cannot stack, and what `check_spec(label, spec)` raises for any other's weight."""
    for node in matmuls(gm):
        spec = scheme_of(node).weight
        if spec is None:
            continue
        if ExpertLinear.match(node) is not None:
            raise RecipeError(
                f"{name} does not choose the codes of experts: {module_path(node)}",
                "use gptq or quantize-weights, or leave the experts in float in the recipe",
            )
        check_spec(label(node), spec)
