"""What calibration left on a graph's nodes, as tensors for a file, and back onto the nodes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from panguq.ir.edit import label
from panguq.passes.observers import InputStatistics, fill_state, state_of
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
                tensors |= state_of(seen, f"statistics/{numbers[id(seen)]}")
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
                fill_state(known[number], tensors, f"statistics/{number}")
            node.meta["input_statistics"] = known[number]
