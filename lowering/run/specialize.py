"""A graph for one number of tokens: every dispatch over m replaced by the kernel it would run."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from panguq.errors import LoweringError
from panguq.ir.edit import call, clone, finish, replace
from panguq.lowering.ascend.dispatch import Operands, kernel_call, parse_kernel, row_for

DISPATCH = torch.ops.panguq.dispatch_matmul.default


def specialize(gm: fx.GraphModule, m: int) -> fx.GraphModule:
    """A copy of a lowered graph without `dispatch_matmul`, as it runs for m = batch * seq tokens.

    It still takes any number of tokens and gives the same result, up to the order of summation;
    it is best for m. Raises LoweringError unless m is a positive integer.
    """
    if not isinstance(m, int) or isinstance(m, bool) or m < 1:
        raise LoweringError(
            f"cannot specialize for m = {m!r} tokens",
            "give a positive integer: batch * 1 for decoding, batch * prompt length for prefill",
        )
    copy = clone(gm)
    for node in [n for n in copy.graph.nodes if n.target is DISPATCH]:
        *operands, last_m, kernels = node.args
        op, args, named = chosen_call(operands, last_m, kernels, m)
        replace(node, call(node, op, args, named, origin=node))
    finish(copy)
    return copy


def chosen_call(operands: list[Any], last_m: list[int], kernels: list[str], m: int) -> Any:
    """The call that a dispatch node with these arguments makes for m tokens."""
    return kernel_call(parse_kernel(kernels[row_for(last_m, m)]), Operands(*operands))
