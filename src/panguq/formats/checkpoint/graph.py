"""What a served model's checkpoint is made of, read from a compiled model's fake-quant graph.

Checkpoint formats store a model by the names of its source: `model.layers.0.mlp.up_proj.weight`.
Passes rewrite weights in place or store codes beside their scales, and every node keeps the path of
the module that it came from; so the graph can be read back into modules. A graph with parts
that have no place in a checkpoint of the source's architecture is refused here, for every format.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from panguq.artifact import FAKE_QUANT, Artifact
from panguq.errors import ExportError
from panguq.formats.checkpoint.architecture import check_modules, float_weights, listed_names
from panguq.formats.checkpoint.linear import (
    QuantizedLinear,
    expert_parts,
    read_linear,
    reads_float,
)
from panguq.ir.analysis.choices import deciding_linears
from panguq.ir.edit import label, module_path
from panguq.ir.views import ExpertLinear, Linear
from panguq.models.architectures import model_class
from panguq.models.hub_names import HubNames, WeightPart, hub_names

aten = torch.ops.aten
panguq = torch.ops.panguq

LINEAR = aten.linear.default
EXPERTS = panguq.expert_linear.default


@dataclass(frozen=True, eq=False)
class CheckpointGraph:
    """A compiled model as its source's modules.

    `quantized` by module path in graph order, experts one by one by their published names;
    `weights` all other tensors by their names in the
    source model, biases of quantized linears excluded, each tied tensor once, under its first
    name; `float_linears` the paths of linears that stay float, the logits' among them; `fused` the
    paths of linears that read one tensor (q, k, v; gate, up), quantized and float ones, which
    servers fuse; `tied` the other names of tied tensors, with the first. `names` are those of the
    published checkpoint.
    """

    quantized: Mapping[str, QuantizedLinear]
    weights: Mapping[str, Tensor]
    float_linears: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...]
    tied: Mapping[str, str]
    names: HubNames

    @property
    def is_tied(self) -> bool:
        """Whether the logits' linear reads the embedding's own tensor."""
        return bool(self.tied)

    def published(self) -> CheckpointGraph:
        """The same under the names of the published checkpoint, which servers know.

        Raises ExportError for weights of which transformers makes others when it loads them.
        """
        names = self.names
        if not names.differ:
            return self
        modules = names.module
        try:
            weights = names.published(self.weights)
        except KeyError as error:
            (name,) = error.args
            raise ExportError(
                f"transformers makes {name} out of other tensors when it loads them, and "
                "panguq does not take that back",
                "save in panguq's own format",
            ) from error
        experts = [
            part.name.removesuffix(".weight")
            for name in self.weights
            for part in names.merged.get(name, ())
            if part.name.endswith(".weight")
        ]
        return replace(
            self,
            quantized={modules(p): replace(q, path=modules(p)) for p, q in self.quantized.items()},
            weights=weights,
            float_linears=(*(modules(path) for path in self.float_linears), *experts),
            fused=tuple(tuple(modules(path) for path in paths) for paths in self.fused),
            tied={names.tensors[one]: names.tensors[first] for one, first in self.tied.items()},
        )


def read_checkpoint_graph(artifact: Artifact) -> CheckpointGraph:
    """The modules and weights of a compiled model.

    Weights are those of the model, not copies. Raises ExportError, naming the modules, for what a
    checkpoint of the source's architecture cannot hold: matmuls that were split or added, weights
    that the architecture does not have or that no longer exist, quantized modules that are no
    `torch.nn.Linear` (GPT-2's `Conv1D`), a quantized KV cache, a model that is not
    transformers'. An op without weights that a pass of your own inserted is not noticed.
    """
    if artifact.config is None or FAKE_QUANT not in artifact.stages:
        raise ExportError(
            "only a compiled model of transformers can be saved as a checkpoint",
            "save other modules in panguq's own format",
        )
    gm = artifact.stages[FAKE_QUANT]
    skeleton = _skeleton(artifact.config)
    by_path: dict[str, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if node.target in (LINEAR, EXPERTS):
            by_path[module_path(node)].append(node)
    _refuse_split(by_path)
    _refuse_quantized_values(gm)
    nodes = {path: same[0] for path, same in by_path.items()}
    read = {
        path: [read_linear(gm, path, node) for node in same]
        for path, same in by_path.items()
        if not reads_float(same[0])
    }
    stacked = {path for path, node in nodes.items() if node.target is EXPERTS}
    check_modules(skeleton, (q for path, (q, *_) in read.items() if path not in stacked))
    weights, tied = float_weights(gm, skeleton, read)
    names = hub_names(skeleton).dividing(path for path in read if path in stacked)
    quantized: dict[str, QuantizedLinear] = {}
    for path, parts in read.items():
        if path not in stacked:
            quantized[path] = parts[0]
            continue
        for linear, node in zip(parts, by_path[path], strict=True):
            experts = _experts(linear, names, ExpertLinear.of(node).each)
            quantized |= {part.path: part for part in experts}
    dense = {path: node for path, node in nodes.items() if path not in stacked}
    routers = deciding_linears(gm)  # they stay float, and no server joins them with others
    return CheckpointGraph(
        quantized=quantized,
        weights=weights,
        float_linears=tuple(path for path in dense if path not in quantized),
        fused=_fused({path: node for path, node in dense.items() if node not in routers}),
        tied=tied,
        names=names,
    )


def parts_of_experts(path: str, names: HubNames) -> tuple[WeightPart, ...]:
    """The tensors of single experts that servers read for the weights in memory at `path`.

    Raises ExportError where none reads any.
    """
    parts = names.merged.get(path) or names.one_by_one.get(path, ())
    if not parts or not all(part.name.endswith(".weight") for part in parts):
        raise ExportError(
            f"{path}: this architecture's experts are published as one tensor, and loaders "
            "take quantized experts one by one alone",
            "leave the experts in float, or save in panguq's own format",
        )
    return parts


def _experts(
    linear: QuantizedLinear, names: HubNames, members: Sequence[int]
) -> list[QuantizedLinear]:
    """A layer's experts one by one, by their published names; `members` are those of the linear."""
    parts = parts_of_experts(linear.path, names)
    places = {expert: place for place, expert in enumerate(members)}
    own = [replace(p, expert=places[p.expert]) for p in parts if p.expert in places]
    return expert_parts(linear, own)


def _skeleton(config: Any) -> nn.Module:
    """The source's modules without memory for their weights."""
    try:
        kind, config = model_class(config)
        with torch.device("meta"):
            model: nn.Module = kind._from_config(config)
    except Exception as error:  # transformers raises whatever its configurations happen to
        raise ExportError(
            f"transformers has no model for a config of type {config.model_type!r}",
            "checkpoints are loaded by architecture; save in panguq's own format",
        ) from error
    return model


def mixed_experts(graph: CheckpointGraph) -> dict[str, list[str]]:
    """The layers, as published, whose experts have several schemes, with these."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for path, linear in graph.quantized.items():
        if linear.is_expert:
            kinds[path.rsplit(".", 2)[0]].add(linear.scheme.name)
    for path in graph.float_linears:
        if path.rsplit(".", 2)[0] in kinds:
            kinds[path.rsplit(".", 2)[0]].add("FLOAT")
    return {layer: sorted(found) for layer, found in kinds.items() if len(found) > 1}


def _refuse_split(by_path: Mapping[str, list[fx.Node]]) -> None:
    divided = {path for path, nodes in by_path.items() if all(_of_some(node) for node in nodes)}
    for path in divided:
        if any(reads_float(node) for node in by_path[path]):
            raise ExportError(
                f"{path}: some of its experts stay float and others do not, which no server takes",
                "give all experts of a layer one scheme, or save in panguq's own format",
            )
    split = [path or "the top module" for path, same in by_path.items()
             if len(same) > 1 and path not in divided]  # fmt: skip
    if split:
        raise ExportError(
            f"{listed_names(split)}: several matmuls each, where the architecture has one (outlier "
            "channels were split off into a float matmul, or the module runs more than once)",
            "compile with a recipe that does not split, such as w8a8-serving or "
            "w8a8-dynamic-serving",
        )


def _of_some(node: fx.Node) -> bool:
    """Whether the node is the matmul of some of a layer's experts."""
    experts = ExpertLinear.match(node)
    return experts is not None and experts.members is not None


def _refuse_quantized_values(gm: fx.GraphModule) -> None:
    """No checkpoint says that a value is rounded that no quantized matmul reads, as in a cache."""
    rounded = [
        label(node)
        for node in gm.graph.nodes
        if node.target is panguq.dequantize.default
        and any(user.target not in (LINEAR, EXPERTS) for user in node.users)
    ]
    if rounded:
        raise ExportError(
            f"{listed_names(rounded)}: quantized, and read by something else than a matmul",
            "compile without quantize-kv-cache, and let the server quantize its cache",
        )


def _fused(nodes: Mapping[str, fx.Node]) -> tuple[tuple[str, ...], ...]:
    """The paths of linears that read one value, before it is quantized."""
    readers: dict[fx.Node, list[str]] = defaultdict(list)
    for path, node in nodes.items():
        readers[Linear.of(node).source].append(path)
    return tuple(tuple(paths) for paths in readers.values() if len(paths) > 1)
