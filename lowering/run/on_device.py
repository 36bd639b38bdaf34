"""Move a prepacked graph to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.call_arguments import operand
from panguq.ir.edit import replace
from panguq.lowering.run.prepack import FORMAT_CAST


def on_device(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """`gm` with its weights on `device`, and with every tensor that it makes made there.

    Weights are brought into the memory formats that the graph casts them to, once.
    """
    for node in list(gm.graph.nodes):
        if node.op == "get_attr":
            tensor: Tensor = getattr(gm, str(node.target))
            object.__setattr__(gm, str(node.target), tensor.to(device))
        node.args = _moved(node.args, device)
        node.kwargs = _moved(node.kwargs, device)
        if node.target is FORMAT_CAST and operand(node, 0).op == "get_attr":
            _, *rest = node.args
            name = str(operand(node, 0).target)
            object.__setattr__(gm, name, FORMAT_CAST(getattr(gm, name), *rest))
            replace(node, operand(node, 0))
    gm.recompile()
    return gm


def _moved(argument: Any, device: torch.device) -> Any:
    if isinstance(argument, torch.device):
        return device
    if isinstance(argument, (list, tuple)):
        return type(argument)(_moved(item, device) for item in argument)
    if isinstance(argument, dict):
        return {name: _moved(item, device) for name, item in argument.items()}
    return argument
