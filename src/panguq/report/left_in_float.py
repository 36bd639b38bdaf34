"""Matmuls that a recipe was to quantize and that stay float all the same: said, and why."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import fx

from panguq.ir.edit import label, module_path, op_name
from panguq.ir.node_meta import scheme_of
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.pipeline.base import PassResult, matmuls


def left_in_float(
    gm: fx.GraphModule, assign: AssignSchemes, results: Iterable[PassResult]
) -> list[str]:
    """A sentence for each reason why matmuls stay float against the recipe's wish.

    `gm` with schemes assigned and fitted to the target, `assign` the pass that did it, `results`
    what the passes so far said of the matmuls that they left alone. One more sentence, the first,
    where the recipe quantizes nothing at all. Matmuls that the recipe itself leaves in float are
    not named, nor is the logits' matmul where no glob names it.
    """
    nodes = matmuls(gm)
    reasons: dict[str, list[str]] = defaultdict(list)  # the last pass that spoke decided
    for result in results:
        for skip in result.skipped:
            reasons[skip.node].append(skip.reason)
    groups: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        if scheme_of(node).is_float and not assign.choose(node)[0].is_float:
            why = reasons.get(label(node), [""])[-1]
            groups[any_layer(why)].append(module_path(node) or label(node))
    found = [
        f"{len(names)} of {len(nodes)} matmuls stay float: {why or 'no reason was given'}: "
        f"{_listed(names)}"
        for why, names in groups.items()
    ]
    if assign.quantizes and all(scheme_of(node).is_float for node in nodes):
        nothing = f"the recipe quantizes nothing of this model: all of its {len(nodes)} matmuls"
        found.insert(0, f"{nothing} stay float")
    called = [node for node in gm.graph.nodes if node.op == "call_function"]
    convolutions = [node for node in called if op_name(node) in ("conv1d", "conv2d")]
    if assign.quantizes and convolutions:
        names = [module_path(node) or label(node) for node in convolutions]
        found.append(f"convolutions are not quantized and stay float: {_listed(names)}")
    return found


def any_layer(text: str) -> str:
    """`model.layers.7.mlp` as `model.layers.*.mlp`."""
    return re.sub(r"(?<=\.)\d+(?=[.:])", "*", text)


def _listed(names: Sequence[str]) -> str:
    """Every name; those that differ only in their layer once, with how many they are."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        layers[any_layer(name)].append(name)
    return ", ".join(
        same[0] if len(same) == 1 else f"{folded} ({len(same)})" for folded, same in layers.items()
    )
