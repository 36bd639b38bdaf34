"""Gate and up projection of all experts, SwiGLU and the codes of its result in one op."""

from __future__ import annotations

import operator

import torch
from torch import fx

from panguq.ir.call_arguments import arguments, operand
from panguq.ir.edit import call, label, read_instead, replace
from panguq.ir.views import Item
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.lowering.ascend.fusions.shared import refusal

aten = torch.ops.aten
npu = torch.ops.npu

_NAME = "npu_grouped_matmul_swiglu_quant_v2"


def fuse_grouped_swiglu(node: fx.Node, allow_inexact: bool) -> fx.Node | str | None:
    """`npu_dynamic_quant(npu_swiglu(npu_grouped_matmul(int8 rows, int8 weights)))` as one op.

    Returns the call of npu_grouped_matmul_swiglu_quant_v2, or why there is none; None for a
    quantizer that reads something else. The op quantizes the float32 product, where the three round
    twice to 16 bits before, and rounds codes twice itself, so that some differ.
    """
    if node.target is not npu.npu_dynamic_quant.default:
        return None
    gated = operand(node, 0)
    if gated.target is not npu.npu_swiglu.default:
        return None
    rows = Item.match(operand(gated, 0))
    if rows is None or rows.source.target is not npu.npu_grouped_matmul.default:
        return None
    grouped, given = rows.source, arguments(rows.source)
    op = npu.npu_grouped_matmul_swiglu_quant_v2.default
    (x,), (weight,) = given["x"], given["weight"]
    if (x.meta["val"].dtype, weight.meta["val"].dtype) != (torch.int8, torch.int8):
        return f"{_NAME} is called with 8-bit rows and 8-bit weights alone"
    if not allow_inexact:
        return (
            f"{_NAME} would not round to 16 bits before it makes codes, and rounds those"
            " twice: it changes codes (allow_inexact permits it)"
        )
    if given["bias"] is not None:
        return f"{_NAME} takes no bias"
    if weight.target is not npu.npu_format_cast.default:
        return f"{_NAME} reads weights in FRACTAL_NZ, and {label(weight)} is not"
    sizes = [user for user in gated.users if user.target is aten.sym_size.int]
    if set(gated.users) != {node, *sizes} or set(rows.node.users) != {gated}:
        return f"{label(gated)} or {label(rows.node)} has other readers"
    plain = arguments(node)["smooth_scales"] is None and node.meta["val"][0].dtype == torch.int8
    if not plain or len(node.users) != 2:
        return "only plain int8 codes per row can be fused"
    args = (x, [weight], given["scale"], *given["per_token_scale"], given["group_list"])
    named = {"group_list_type": given["group_list_type"]}
    if reason := refusal(op, args, named):
        return reason
    fused = call(node, op, args, named, origin=grouped, suffix=".swiglu_quant")
    codes = call(node, operator.getitem, (fused, 0), origin=rows.node)
    for size in sizes:  # the number of rows: the columns' is known
        read_instead(size, 0, x)
    items = {item.index: item.node for item in map(Item.match, node.users) if item is not None}
    scale = call(node, operator.getitem, (fused, 1), origin=items[1])
    replace(items[0], codes)
    replace(rows.node, codes)  # which is the matmul's value now, to whoever asks for its kernel
    replace(items[1], scale)
    return fused
