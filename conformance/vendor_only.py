"""A lowered graph with CANN's kernels alone, for torchair, which has no converter for panguq's.

Own kernels read the same stored weight as CANN's, so each can be replaced by the vendor's call;
4-bit codes are then laid out for that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from panguq.ir.edit import call, clone, finish, replace
from panguq.lowering.ascend.dispatch import Operands, kernel_call, parse_kernel

panguq = torch.ops.panguq
own = torch.ops.panguq_npu


def vendor_only(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which every matmul by an own kernel, or by a table of kernels, is CANN's."""
    result = clone(gm)
    for node in list(result.graph.nodes):
        given = _operands(node)
        if given is not None:
            weight_only = given.x.meta["val"].dtype != torch.int8
            name = "npu_weight_quant_batchmatmul" if weight_only else "npu_quant_matmul"
            if given.weight.target is own.int4_quarters.default:
                layout, packed = own.int4_weight.default, given.weight.args
                laid_out = call(given.weight, layout, packed, origin=node, suffix=".words")
                given = dataclasses.replace(given, weight=laid_out)
            op, args, named = kernel_call(parse_kernel(name), given)
            replace(node, call(node, op, args, named, origin=node, suffix=".vendor"))
    finish(result)
    return result


def _operands(node: fx.Node) -> Operands | None:
    """What a matmul of panguq's own reads; None for any other node."""
    args: tuple[Any, ...] = node.args
    if node.target is panguq.dispatch_matmul.default:
        return Operands(*args[:8])
    if node.target is own.w8a8.default:
        x, weight, scale, pertoken_scale, bias, dtype = args[:6]
        return Operands(x, weight, scale, None, pertoken_scale, bias, 0, dtype)
    if node.target is own.w4a16.default:
        x, weight, scale, offset, bias, group_size = args[:6]
        dtype = x.meta["val"].dtype
        return Operands(x, weight, scale, offset, None, bias, group_size, dtype)
    return None
