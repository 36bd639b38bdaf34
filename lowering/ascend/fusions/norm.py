"""rms_norm, with the sum before it and the quantization after it, as one op of the vendor."""

from __future__ import annotations

import operator

import torch
from torch import fx

from panguq.ir.call_arguments import arguments, operand, optional_operand
from panguq.ir.canonical_views import RmsNorm
from panguq.ir.edit import (
    call,
    erase_unused,
    free_name,
    get_tensor,
    label,
    op_name,
    read_instead,
    replace,
    tensor_node,
)
from panguq.ir.views import Item
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers torch.ops.npu.*)
from panguq.lowering.ascend.fusions.shared import FusionState, refusal, same_shape
from panguq.tensors.dtypes import dtype_name

aten = torch.ops.aten
npu = torch.ops.npu

NORM, SUM = 0, 2  # results of npu_add_rms_norm; ops that also quantize give codes for the norm
DYNAMIC_SCALE = 3  # result of npu_add_rms_norm_dynamic_quant
ALIGNMENT_BYTES = 32  # of a row, for the quantizing ops (torchair's pattern conditions)


def fuse_rms_norm(node: fx.Node, state: FusionState) -> fx.Node | str:
    """`npu_rms_norm(x, w, eps)[0]`, or of a sum `npu_add_rms_norm(a, b, w, eps)[0]`; or why not.

    The sum's other readers get the fused op's third result, so the sum is computed once. A weight
    to which 1 is added is read as a float32 `w + 1`, which is made when the model is loaded.
    """
    given = RmsNorm.of(node)
    x, weight, eps, offset = given.x, given.weight, given.eps, given.offset
    if x.target is aten.add.Tensor:
        reason = _obstacle_to_sum(x, weight, eps)
        reason = "npu_add_rms_norm takes no weight in float32" if offset else reason
        if reason is None:
            return _fuse_with_sum(node, x)
        state.result.skip(node, f"the sum {label(x)} stays an op of its own: {reason}")
    gain = _gain(node, weight, offset) if offset else weight
    args = (x, gain, eps)
    op = npu.npu_rms_norm.default
    reason = refusal(op, args)
    if reason is not None:
        erase_unused([gain] if offset else [])
        return reason
    pair = call(node, op, args, origin=node, suffix=".fused")
    return call(node, operator.getitem, (pair, NORM), origin=node)


def _gain(node: fx.Node, weight: fx.Node, offset: float) -> fx.Node:
    """`weight + offset` in float32: rounded to 16 bits it would be another one."""
    wide = weight
    if weight.meta["val"].dtype in (torch.bfloat16, torch.float16):
        wide = call(node, aten.to.dtype, (weight, torch.float32), origin=node, suffix=".wide")
    return call(node, aten.add.Tensor, (wide, offset), origin=node, suffix=".gain")


def fuse_layer_norm(node: fx.Node, state: FusionState) -> fx.Node | str:
    """Why `panguq.layer_norm` becomes `aten.layer_norm`, which torch_npu runs as one op."""
    return "no op of the vendor adds to the weight of a layer norm"


def _obstacle_to_sum(x: fx.Node, weight: fx.Node, eps: float) -> str | None:
    """Why npu_add_rms_norm cannot compute this sum; None if it can."""
    terms = [optional_operand(x, 0), optional_operand(x, 1)]
    if x.kwargs or len(x.args) != 2 or None in terms:
        return "it is not a plain sum of two tensors"
    for term in filter(None, terms):
        value = term.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype != x.meta["val"].dtype:
            return f"{label(term)} has another dtype than the sum"
        if not same_shape(term, x):
            return f"{label(term)} is broadcast"
    if x < weight and weight.op != "get_attr":
        return f"the weight {label(weight)} is computed after it"
    return refusal(npu.npu_add_rms_norm.default, (*terms, weight, eps))


def _fuse_with_sum(node: fx.Node, total: fx.Node) -> fx.Node:
    weight, eps = RmsNorm.of(node).weight, RmsNorm.of(node).eps
    if total < weight:  # a stored weight, which can be read anywhere
        total.prepend(weight)
    args = (*total.args, weight, eps)
    fused = call(total, npu.npu_add_rms_norm.default, args, origin=node, suffix=".fused")
    norm = call(total, operator.getitem, (fused, NORM), origin=node)
    replace(total, call(total, operator.getitem, (fused, SUM), origin=total))
    return norm


# --- quantization -------------------------------------------------------------------------------


def fuse_quantizer(node: fx.Node, allow_inexact: bool) -> fx.Node | str | None:
    """Quantize inside the npu_add_rms_norm whose norm `node` reads, and take `node` out.

    Returns the fused call, or why there is none; None for a quantizer that reads no such norm.
    """
    item = Item.match(operand(node, 0))
    if item is None or item.index != NORM:
        return None
    norm, fused = item.node, item.source
    if fused.target is not npu.npu_add_rms_norm.default:
        return None
    value = norm.meta["val"]
    if not allow_inexact:
        dtype = dtype_name(value.dtype)
        return (
            f"{op_name(node)} inside npu_add_rms_norm would read the norm before it is rounded "
            f"to {dtype}, and so change codes (allow_inexact permits it)"
        )
    sizes = [user for user in norm.users if user.target is aten.sym_size.int]
    if set(norm.users) != {node, *sizes}:
        return f"{label(norm)} has other readers"
    if value.shape[-1] * value.element_size() % ALIGNMENT_BYTES:
        return f"rows of {label(norm)} are not aligned to {ALIGNMENT_BYTES} bytes"
    made = (
        _fuse_static(node, fused)
        if node.target is npu.npu_quantize.default
        else _fuse_dynamic(node, fused)
    )
    if isinstance(made, fx.Node):
        for size in sizes:  # the norm has the shape of what it normalizes
            read_instead(size, 0, operand(made, 0))
        erase_unused([norm])
    return made


def _sum_and_norm(fused: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, float]:
    """The terms, the norm's weight and its eps that npu_add_rms_norm reads."""
    given = arguments(fused)
    return given["x1"], given["x2"], given["gamma"], given["epsilon"]


def _fuse_static(node: fx.Node, fused: fx.Node) -> fx.Node | str:
    """`npu_quantize(norm, 1 / scale, zero, qint8, -1, False)` as npu_add_rms_norm_quant."""
    given = arguments(node)
    if (
        node.meta["val"].dtype != torch.int8
        or given["axis"] != -1
        or given["div_mode"] is not False
    ):
        return "only int8 codes of the last axis with multiplied scales can be fused"
    scale, zero = given["scales"], given["zero_points"]
    if any(
        n is not None and (n.op != "get_attr" or n.meta["val"].numel() != 1) for n in (scale, zero)
    ):
        return "its scale and zero point are not one stored number each"
    *terms, gamma, eps = _sum_and_norm(fused)
    wide = gamma.meta["val"].dtype == torch.float16  # A2: float32 and int32, else all bfloat16
    scales = _per_column(fused, scale, torch.float32 if wide else torch.bfloat16)
    zeros = None
    if zero is not None:
        zeros = _per_column(fused, zero, torch.int32 if wide else torch.bfloat16)
    args = (*terms, gamma, scales, zeros)
    kwargs = {"axis": -1, "epsilon": eps, "div_mode": False}
    op = npu.npu_add_rms_norm_quant.default
    reason = refusal(op, args, kwargs)
    if reason is not None:
        erase_unused([n for n in (scales, zeros) if n is not None])
        return reason
    made = call(fused, op, args, kwargs, origin=node, suffix=".fused")
    _take_over(fused, made)
    replace(node, call(node, operator.getitem, (made, NORM), origin=node))
    return made


def _fuse_dynamic(node: fx.Node, fused: fx.Node) -> fx.Node | str:
    """`npu_dynamic_quant(norm)` as npu_add_rms_norm_dynamic_quant."""
    if node.meta["val"][0].dtype != torch.int8 or len(node.args) > 1 or node.kwargs:
        return "only plain int8 codes per token can be fused"
    *terms, gamma, eps = _sum_and_norm(fused)
    args, kwargs = (*terms, gamma), {"epsilon": eps, "output_mask": [True, False]}
    op = npu.npu_add_rms_norm_dynamic_quant.default
    reason = refusal(op, args, kwargs)
    if reason is not None:
        return reason
    made = call(fused, op, args, kwargs, origin=node, suffix=".fused")
    _take_over(fused, made)
    for item in list(node.users):
        result = NORM if Item.of(item).index == 0 else DYNAMIC_SCALE
        replace(item, call(item, operator.getitem, (made, result), origin=item))
    return made


def _take_over(fused: fx.Node, made: fx.Node) -> None:
    """Let readers of the sum that `fused` gives read the one that `made` gives."""
    for item in list(fused.users):
        if Item.of(item).index == SUM:
            replace(item, call(item, operator.getitem, (made, SUM), origin=item))


def _per_column(before: fx.Node, stored: fx.Node, dtype: torch.dtype) -> fx.Node:
    """One stored number for each column of the norm, as the fused op's shapes demand."""
    gm = before.graph.owning_module
    assert gm is not None
    columns = arguments(before)["gamma"].meta["val"].shape[0]
    name = free_name(gm, f"{stored.target}_per_column")
    values = get_tensor(gm, str(stored.target)).to(dtype).reshape(1).repeat(columns)
    return tensor_node(before, name, values)
