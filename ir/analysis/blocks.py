"""Cuts of a graph where one value carries everything: the residual stream between blocks.

A value through which every path from the first input to the first output runs (a dominator)
is a cut. Around it only that value and tables that do not depend on the first input (masks,
rotary tables) need to be kept, so a graph can be run block by block over many batches with
the weights of one block in memory.
"""

from __future__ import annotations

import networkx
from torch import fx


def cuts(gm: fx.GraphModule) -> list[fx.Node]:
    """The dominators of the graph's first output, seen from its first input, in graph order."""
    nodes = list(gm.graph.nodes)
    start = nodes[0]
    results = nodes[-1].args[0]
    end = results[0] if isinstance(results, (tuple, list)) else results
    flow = networkx.DiGraph()
    reached = {start}
    for node in nodes:
        for source in node.all_input_nodes:
            if source in reached and not _is_size(node):
                reached.add(node)
                flow.add_edge(source, node)
    if end not in reached or not isinstance(end, fx.Node):
        return []
    parents = networkx.immediate_dominators(flow, start)
    chain = [end]
    while chain[-1] is not start:
        chain.append(parents[chain[-1]])
    return chain[-2::-1]


def blocks(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The computing nodes in graph order, split after every cut."""
    ends = set(cuts(gm))
    result: list[list[fx.Node]] = [[]]
    for node in gm.graph.nodes:
        if node.op in ("call_function", "get_attr"):
            result[-1].append(node)
            if node in ends:
                result.append([])
    return [block for block in result if block]


def _is_size(node: fx.Node) -> bool:
    """Sizes carry no data: a path through one is no path."""
    return "sym_size" in str(node.target)
