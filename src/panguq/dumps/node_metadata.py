"""What passes left on a graph's nodes, as tensors for a file, and back onto the nodes.

The fields of NodeMeta that graph.json does not have: it names labels, module paths and schemes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from panguq.dumps.files import NodeMetadata
from panguq.ir.edit import label
from panguq.ir.input_statistics import InputStatistics, fill_state, state_of
from panguq.ir.node_meta import annotate, meta_of
from panguq.ir.quant_spec import parse_scheme

Collected = tuple[NodeMetadata, dict[str, Tensor]]
NOTHING: Collected = (NodeMetadata(statistics={}, split_from={}), {})


def collect(gm: fx.GraphModule) -> Collected:
    """All nodes' metadata; numbers become tensors of no dimension, shared objects are told once."""
    found = NodeMetadata(
        statistics={}, split_from={}, token_weights={}, merged={}, expert_schemes={}
    )
    tensors: dict[str, Tensor] = {}
    numbers: dict[int, int] = {}
    weight_numbers: dict[int, int] = {}
    for node in gm.graph.nodes:
        meta, name = meta_of(node), label(node)
        if meta.input_range is not None:
            tensors[f"input_range/{name}"] = torch.tensor(meta.input_range, dtype=torch.float64)
        if meta.input_clip is not None:
            tensors[f"input_clip/{name}"] = torch.tensor(meta.input_clip, dtype=torch.float64)
        if meta.split_from is not None:
            found.split_from[name] = meta.split_from
        if meta.expert_schemes:
            found.expert_schemes[name] = tuple(scheme.name for scheme in meta.expert_schemes)
        if meta.merged:
            found.merged[name] = meta.merged
        if meta.input_statistics is not None:
            number = numbers.setdefault(id(meta.input_statistics), len(numbers))
            tensors |= state_of(meta.input_statistics, f"statistics/{number}")
            found.statistics[name] = number
        if meta.token_weights is not None:
            number = weight_numbers.setdefault(id(meta.token_weights), len(weight_numbers))
            batches = enumerate(meta.token_weights)
            tensors |= {f"token_weights/{number}/{batch:06d}": part for batch, part in batches}
            found.token_weights[name] = number
    return found, tensors


def restore(gm: fx.GraphModule, metadata: NodeMetadata, tensors: Mapping[str, Tensor]) -> None:
    """Put what `collect` found back onto the nodes with the same labels."""
    statistics = {number: _statistics(tensors, number) for number in metadata.statistics.values()}
    weights = {number: _weights(tensors, number) for number in metadata.token_weights.values()}
    for node in gm.graph.nodes:
        name = label(node)
        if f"input_range/{name}" in tensors:
            annotate(node, input_range=tuple(tensors[f"input_range/{name}"].tolist()))
        if f"input_clip/{name}" in tensors:
            annotate(node, input_clip=float(tensors[f"input_clip/{name}"]))
        if name in metadata.split_from:
            annotate(node, split_from=metadata.split_from[name])
        if name in metadata.expert_schemes:
            each = tuple(parse_scheme(scheme) for scheme in metadata.expert_schemes[name])
            annotate(node, expert_schemes=each)
        if name in metadata.merged:
            annotate(node, merged=metadata.merged[name])
        if name in metadata.statistics:
            annotate(node, input_statistics=statistics[metadata.statistics[name]])
        if name in metadata.token_weights:
            annotate(node, token_weights=weights[metadata.token_weights[name]])


def _statistics(tensors: Mapping[str, Tensor], number: int) -> InputStatistics:
    found = InputStatistics(0)
    fill_state(found, tensors, f"statistics/{number}")
    return found


def _weights(tensors: Mapping[str, Tensor], number: int) -> tuple[Tensor, ...]:
    prefix = f"token_weights/{number}/"
    return tuple(tensors[name] for name in sorted(tensors) if name.startswith(prefix))
