"""What a pass changed in the printed graph, line by line under the nodes' labels."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from torch import fx

from panguq.ir.edit import label

_REFERENCE = re.compile(r"%([^\s,()\[\]]+)")


def labels_by_name(gm: fx.GraphModule) -> dict[str, str]:
    """fx's own name of every node and its label: how `renamed` knows a node again."""
    return {node.name: label(node) for node in gm.graph.nodes}


def renamed(before: Mapping[str, str], gm: fx.GraphModule) -> dict[str, str]:
    """New label to old label, of nodes that stayed and were labelled anew."""
    after = labels_by_name(gm)
    return {new: before[name] for name, new in after.items() if before.get(name, new) != new}


def graph_diff(before: str, after: str, names: Mapping[str, str], titles: tuple[str, str]) -> str:
    """Unified diff of two printed graphs; `names` (see `renamed`) are no difference."""
    new_names = {old: new for new, old in names.items()}
    if new_names:
        before = _REFERENCE.sub(lambda m: f"%{new_names.get(m[1], m[1])}", before)
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *titles, n=1, lineterm="")
    return "".join(f"{line}\n" for line in lines)
