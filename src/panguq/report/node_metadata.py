"""What calibration left on a graph's nodes, as tensors for a file, and back onto the nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.edit import label
from panguq.passes.observers import Histogram, InputStatistics
from panguq.report.dump_files import NodeMetadata

Collected = tuple[NodeMetadata, dict[str, Tensor]]
NOTHING: Collected = (NodeMetadata(statistics={}, split_from={}), {})


def collect(gm: fx.GraphModule) -> Collected:
    """Statistics, ranges and origins of all nodes; numbers become tensors of no dimension."""
    numbers: dict[int, int] = {}
    of_node: dict[str, int] = {}
    split_from: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for node in gm.graph.nodes:
        if "input_range" in node.meta:
            pair = torch.tensor(node.meta["input_range"], dtype=torch.float64)
            tensors[f"input_range/{label(node)}"] = pair
        if "split_from" in node.meta:
            split_from[label(node)] = node.meta["split_from"]
        seen = node.meta.get("input_statistics")
        if seen is not None:
            if id(seen) not in numbers:
                numbers[id(seen)] = len(numbers)
                tensors |= _state(seen, f"statistics/{numbers[id(seen)]}")
            of_node[label(node)] = numbers[id(seen)]
    return NodeMetadata(statistics=of_node, split_from=split_from), tensors


def restore(gm: fx.GraphModule, metadata: NodeMetadata, tensors: Mapping[str, Tensor]) -> None:
    """Put what `collect` found back onto the nodes with the same labels."""
    known: dict[int, InputStatistics] = {}
    for node in gm.graph.nodes:
        name = label(node)
        if f"input_range/{name}" in tensors:
            node.meta["input_range"] = tuple(tensors[f"input_range/{name}"].tolist())
        if name in metadata.split_from:
            node.meta["split_from"] = metadata.split_from[name]
        if name in metadata.statistics:
            number = metadata.statistics[name]
            if number not in known:
                known[number] = InputStatistics(0)
                _fill(known[number], tensors, f"statistics/{number}")
            node.meta["input_statistics"] = known[number]


def _state(of: Any, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in vars(of).items():
        if isinstance(value, Histogram):
            found |= _state(value, f"{prefix}/{name}")
        elif isinstance(value, Tensor):
            found[f"{prefix}/{name}"] = value
        elif isinstance(value, float):
            found[f"{prefix}/{name}"] = torch.tensor(value, dtype=torch.float64)
        elif isinstance(value, int):
            found[f"{prefix}/{name}"] = torch.tensor(value, dtype=torch.int64)
    return found


def _fill(into: Any, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Set the attributes that `into` has anyway; a file cannot add others."""
    for name, value in list(vars(into).items()):
        stored = tensors.get(f"{prefix}/{name}")
        if isinstance(value, Histogram):
            _fill(value, tensors, f"{prefix}/{name}")
        elif stored is not None:
            setattr(into, name, stored if isinstance(value, Tensor | None) else stored.item())
