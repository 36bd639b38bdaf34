"""A quantized KV cache on Ascend: vendor and aten ops around the fused attention."""

from __future__ import annotations

import operator

import torch
from torch import fx

from panguq.ir.edit import call
from panguq.ir.views import Item, QuantizedInput, argument, arguments, operand
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.lowering.ascend.fusions.shared import FusionState, refusal

aten = torch.ops.aten
npu = torch.ops.npu


def fuse_quantize_per_token(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`npu_dynamic_quant(x)`, whose scales `[...]` get the axis of one that ours have."""
    x, quant_max = operand(node, 0), argument(node, 1)
    if quant_max != 127:
        return f"npu_dynamic_quant has codes up to 127, not {quant_max}"
    reason = refusal(npu.npu_dynamic_quant.default, (x,))
    if reason is not None:
        return reason
    pair = call(node, npu.npu_dynamic_quant.default, (x,), origin=node, suffix=".fused")
    for item in [user for user in node.users if Item.of(user).index == 1]:
        scale = call(item, operator.getitem, (pair, 1), origin=item, suffix=".flat")
        column = call(item, aten.unsqueeze.default, (scale, -1), origin=item, suffix=".column")
        item.replace_all_uses_with(column)
    return pair


def fuse_quantize_per_channel(node: fx.Node, state: FusionState) -> fx.Node | str:
    """Never: no NPU op quantizes with a scale for each head and channel."""
    return "npu_quantize has one axis of scales, and a cache's differ by head and channel"


def fuse_dequantize(node: fx.Node, state: FusionState) -> fx.Node | str:
    """Never: in a lowered graph only the cache is still dequantized, in front of attention."""
    return "the cache is dequantized in front of attention, which reads floats"


def spell_quantize_per_channel(node: fx.Node, state: FusionState) -> fx.Node:
    """`clamp(round(x * (1 / scale)), -quant_max, quant_max)` in float32, as int8."""
    given = arguments(node)
    x, scale, quant_max = given["x"], given["scale"], given["quant_max"]
    factor = call(node, aten.reciprocal.default, (scale,), origin=node, suffix=".factor")
    wide = call(node, aten.to.dtype, (x, torch.float32), origin=node, suffix=".wide")
    scaled = call(node, aten.mul.Tensor, (wide, factor), origin=node, suffix=".scaled")
    rounded = call(node, aten.round.default, (scaled,), origin=node, suffix=".rounded")
    limits = (rounded, -quant_max, quant_max)
    clamped = call(node, aten.clamp.default, limits, origin=node, suffix=".clamped")
    return call(node, aten.to.dtype, (clamped, torch.int8), origin=node)


def spell_dequantize(node: fx.Node, state: FusionState) -> fx.Node:
    """`codes * scale` in float32, as the node's dtype; a cache's codes have no zero point."""
    given = QuantizedInput.of(node)
    wide = call(node, aten.to.dtype, (given.codes, torch.float32), origin=node, suffix=".wide")
    scaled = call(node, aten.mul.Tensor, (wide, given.scale), origin=node, suffix=".scaled")
    return call(node, aten.to.dtype, (scaled, given.dtype), origin=node)
