"""Gated activations: `silu(gate) * up` and `gelu(gate) * up`."""

from __future__ import annotations

import torch
from torch import fx

from panguq.ir.call_arguments import arguments, operand
from panguq.ir.edit import call
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.passes.patterns.matching import both_orders, is_call, type_of

aten = torch.ops.aten
panguq = torch.ops.panguq


def to_gated_activation(node: fx.Node) -> fx.Node | None:
    """Anchored at the product of two tensors of one shape and dtype."""
    for active, up in both_orders(node):
        if not is_call(active, aten.silu.default, aten.gelu.default) or not isinstance(up, fx.Node):
            continue
        if active.meta["val"].shape != up.meta["val"].shape or type_of(active) != type_of(up):
            return None
        gate = operand(active, 0)
        if active.target is aten.silu.default:
            return call(node, panguq.swiglu.default, (gate, up), origin=node)
        args = (gate, up, arguments(active)["approximate"])
        return call(node, panguq.geglu.default, args, origin=node)
    return None
