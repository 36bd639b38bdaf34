"""Run once what depends on stored weights alone: layouts that only a machine's kernels know."""

from __future__ import annotations

import torch
from torch import fx

from panguq.ir.edit import finish, label, replace, tensor_node
from panguq.ir.interpret import compute

cpu = torch.ops.panguq_cpu

PREPACKING = ("int4_kernel_weight", "int4_kernel_scales", "weight_row_sums")


def prepack(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace every prepacking call of a stored weight by its result; returns `gm`.

    What it makes depends on the machine, so a prepacked graph is run and never saved.
    """
    ops = {getattr(cpu, name).default for name in PREPACKING if hasattr(cpu, name)}
    for node in list(gm.graph.nodes):
        if node.target in ops and all(s.op == "get_attr" for s in node.all_input_nodes):
            values = {s: compute(gm, s, {}) for s in node.all_input_nodes}
            name = label(node).replace(":", ".")
            replace(node, tensor_node(node, f"prepacked.{name}", compute(gm, node, values)))
    finish(gm)
    return gm
