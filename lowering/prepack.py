"""Run once what depends on stored weights alone: layouts that only a machine's kernels know."""

from __future__ import annotations

import torch
from torch import fx

from panguq.ir.edit import finish, get_tensor, label, replace, tensor_node
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
    return _with_plain_attributes(gm)


def _with_plain_attributes(gm: fx.GraphModule) -> fx.GraphModule:
    """Weights as plain attributes under short names: a nested module's buffer takes several
    look-ups in Python to reach, a twelfth of a decoding step on a small model."""
    names: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            name = names.setdefault(str(node.target), f"weight_{len(names)}")
            object.__setattr__(gm, name, get_tensor(gm, str(node.target)))
            node.target = name
    gm._modules.clear()
    gm._buffers.clear()
    gm.recompile()
    return gm
