"""What is quantized in front of attention, a cache and latents: vendor and aten ops."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from panguq.ir.call_arguments import argument, arguments, operand
from panguq.ir.edit import call
from panguq.ir.ops.quantize import SMALLEST_AMAX
from panguq.ir.views import Item, QuantizedInput
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.lowering.ascend.fusions.shared import FusionState, refusal

aten = torch.ops.aten
npu = torch.ops.npu


def fuse_quantize_per_token(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`npu_dynamic_quant(x)`, whose scales `[...]` get the axis of one that ours have."""
    x, quant_max = operand(node, 0), argument(node, 1)
    if quant_max != 127:
        return f"npu_dynamic_quant has codes up to 127, not {quant_max}"
    if arguments(node)["clip"] != 1.0:
        return "npu_dynamic_quant clips no token"
    reason = refusal(npu.npu_dynamic_quant.default, (x,))
    if reason is not None:
        return reason
    pair = call(node, npu.npu_dynamic_quant.default, (x,), origin=node, suffix=".fused")
    for item in [user for user in node.users if Item.of(user).index == 1]:
        scale = call(item, operator.getitem, (pair, 1), origin=item, suffix=".flat")
        column = call(item, aten.unsqueeze.default, (scale, -1), origin=item, suffix=".column")
        item.replace_all_uses_with(column)
    return pair


def spell_quantize_per_token(node: fx.Node, state: FusionState) -> fx.Node:
    """`scale = max(amax|x|, 1e-30) / quant_max` and `round(x * (1 / scale))`, in float32."""
    given = arguments(node)

    def step(op: Any, args: tuple[Any, ...], suffix: str) -> fx.Node:
        return call(node, op, args, origin=node, suffix=f".{suffix}")

    wide = step(aten.to.dtype, (given["x"], torch.float32), "wide")
    largest = step(aten.amax.default, (step(aten.abs.default, (wide,), "abs"), [-1], True), "amax")
    positive = step(aten.clamp_min.default, (largest, SMALLEST_AMAX), "positive")
    scale = step(aten.div.Scalar, (positive, given["quant_max"]), "scale")
    if given["clip"] != 1.0:
        scale = step(aten.mul.Scalar, (scale, given["clip"]), "clipped_scale")
    factor = step(aten.reciprocal.default, (scale,), "factor")
    rounded = step(
        aten.round.default, (step(aten.mul.Tensor, (wide, factor), "scaled"),), "rounded"
    )
    if given["clip"] != 1.0:
        limits = (rounded, -given["quant_max"], given["quant_max"])
        rounded = step(aten.clamp.default, limits, "clamped")
    codes = step(aten.to.dtype, (rounded, torch.int8), "codes")
    for item in list(node.users):
        item.replace_all_uses_with((codes, scale)[Item.of(item).index])
        node.graph.erase_node(item)
    return codes


def fuse_quantize_per_tensor(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`npu_quantize(x, 1 / scale, zero_point)` of int8 codes."""
    given = arguments(node)
    if (given["quant_min"], given["quant_max"]) != (-128, 127):
        return "npu_quantize has codes of -128 to 127"
    x, dtype = given["x"], given["x"].meta["val"].dtype
    inverse = call(node, aten.reciprocal.default, (given["scale"],), origin=node, suffix=".inverse")
    factor = call(node, aten.to.dtype, (inverse, dtype), origin=node, suffix=".factor")
    zero = call(node, aten.to.dtype, (given["zero_point"], dtype), origin=node, suffix=".zero")
    args = (x, factor, zero, dtype_number(torch.qint8), -1, False)
    reason = refusal(npu.npu_quantize.default, args)
    return reason or call(node, npu.npu_quantize.default, args, origin=node, suffix=".fused")


def spell_quantize_per_tensor(node: fx.Node, state: FusionState) -> fx.Node:
    """`clamp(round(x * (1 / scale) + zero_point))` in float32, the factor in x's dtype."""
    given = arguments(node)
    x, dtype = given["x"], given["x"].meta["val"].dtype

    def step(op: Any, args: tuple[Any, ...], suffix: str) -> fx.Node:
        return call(node, op, args, origin=node, suffix=f".{suffix}")

    factor = step(aten.reciprocal.default, (given["scale"],), "inverse")
    if dtype != torch.float32:
        factor = step(aten.to.dtype, (factor, dtype), "narrow_factor")
        factor = step(aten.to.dtype, (factor, torch.float32), "factor")
    scaled = step(aten.mul.Tensor, (x, factor), "scaled")
    shifted = step(aten.add.Tensor, (scaled, given["zero_point"]), "shifted")
    rounded = step(aten.round.default, (shifted,), "rounded")
    limits = (rounded, given["quant_min"], given["quant_max"])
    clamped = step(aten.clamp.default, limits, "clamped")
    return call(node, aten.to.dtype, (clamped, torch.int8), origin=node)


def fuse_quantize_per_channel(node: fx.Node, state: FusionState) -> fx.Node | str:
    """Never: no NPU op quantizes with a scale for each head and channel."""
    return "npu_quantize has one axis of scales, and a cache's differ by head and channel"


def fuse_dequantize(node: fx.Node, state: FusionState) -> fx.Node | str:
    """Never: in a lowered graph only what attention reads is still dequantized, in front of it."""
    return "attention reads floats: its cache or latents are dequantized in front of it"


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
    """`(codes - zero_point) * scale` in float32, as the node's dtype."""
    given = QuantizedInput.of(node)
    wide = call(node, aten.to.dtype, (given.codes, torch.float32), origin=node, suffix=".wide")
    if given.zero_point is not None:
        args = (wide, given.zero_point)
        wide = call(node, aten.sub.Tensor, args, origin=node, suffix=".centred")
    scaled = call(node, aten.mul.Tensor, (wide, given.scale), origin=node, suffix=".scaled")
    return call(node, aten.to.dtype, (scaled, given.dtype), origin=node)
