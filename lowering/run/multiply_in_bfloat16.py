"""Float matmuls and attention in bfloat16, on a machine where that is faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.call_arguments import arguments
from panguq.ir.edit import erase_unused, get_tensor, tensor_node
from panguq.ir.interface import Interface
from panguq.ir.ops.canonical import attention
from panguq.kernels.cpu import multiplying
from panguq.kernels.cpu.bfloat16_float import bfloat16_attention, bfloat16_linear
from panguq.lowering.problem import Precision

_LINEAR = torch.ops.aten.linear.default


def in_bfloat16(precision: Precision, interface: Interface) -> bool:
    """Whether a graph for the CPU target multiplies its floats in bfloat16 on this machine."""
    if interface.kind != "causal_lm" or interface.float_dtype != "float32":
        return False
    return precision == "bfloat16" or (precision == "auto" and multiplying.bfloat16_is_faster())


def multiply_in_bfloat16(gm: fx.GraphModule) -> None:
    """Before: `linear(x, weight, bias)` of a stored float32 weight, and `attention`.
    After: `bfloat16_linear(x, weight16, bias)` with the weight rounded once, here, and
    `bfloat16_attention`. Values between ops, norms and the cache stay float32, and so does
    attention with sinks or a softcap, which is computed score by score.
    """
    rounded: dict[str, Tensor] = {}
    for node in list(gm.graph.nodes):
        if node.target is _LINEAR:
            weight = arguments(node)["weight"]
            if weight.op != "get_attr" or _stored(gm, weight).dtype != torch.float32:
                continue
            name = f"rounded.{weight.target}"
            if name not in rounded:
                rounded[name] = _stored(gm, weight).to(torch.bfloat16)
            own = tensor_node(node, name, rounded[name])
            given = arguments(node)
            _replace(node, bfloat16_linear, (given["input"], own, given["bias"]))
        elif node.target is attention:
            given = arguments(node)
            if given["sinks"] is None and given["softcap"] == 0.0:
                names = ("query", "key", "value", "mask", "scale")
                _replace(node, bfloat16_attention, tuple(given[name] for name in names))


def _stored(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    return get_tensor(gm, str(node.target))


def _replace(node: fx.Node, op: Any, args: tuple[Any, ...]) -> None:
    """A call of `op` instead. A graph from a file does not know the types of its values."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(op, args)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    erase_unused([node])
