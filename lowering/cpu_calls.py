"""How a fake-quant matmul is written in the kernels of the CPU target."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from panguq.errors import LoweringError
from panguq.ir.edit import call, label, op_name
from panguq.kernels import binary
from panguq.kernels.cpu import (  # noqa: F401  (registers torch.ops.panguq_cpu.*)
    binary_linear,
    dequantized_linear,
    int4_linear,
    int8_linear,
    int8_weight_linear,
)
from panguq.lowering.select_kernel import Choice

panguq = torch.ops.panguq
cpu = torch.ops.panguq_cpu


def lower_on_cpu(node: fx.Node, choice: Choice) -> fx.Node:
    """The call of the chosen kernel, in front of `node`."""
    return _LOWERINGS[choice.kernel](node, choice)


def _bias(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else None


def _int8(node: fx.Node, choice: Choice) -> fx.Node:
    dequantize, weight = node.args[:2]
    codes, act_scale, zero_point, dtype = dequantize.args
    weight_codes, weight_scale = weight.args[:2]
    sums = None
    if zero_point is not None:
        sums = call(
            node, cpu.weight_row_sums.default, (weight_codes,), origin=node, suffix=".row_sums"
        )
    args = (codes, act_scale, zero_point, weight_codes, weight_scale, sums, _bias(node), dtype)
    return call(node, cpu.int8_linear.default, args, origin=node)


def _int8_weight(node: fx.Node, choice: Choice) -> fx.Node:
    codes, scale = node.args[1].args[:2]
    args = (node.args[0], codes, scale, _bias(node), choice.few_tokens)
    return call(node, cpu.int8_weight_linear.default, args, origin=node)


def _int4(node: fx.Node, choice: Choice) -> fx.Node:
    unpacked, scale, zero_point, group_size, _ = node.args[1].args
    if unpacked.target is not panguq.unpack_int4.default:
        raise LoweringError(
            f"{label(node)}: int4_linear cannot read what {op_name(unpacked)} does",
            "this is a defect of the choice of kernels; please report it",
        )
    packed = unpacked.args[0]
    weight = call(
        node, cpu.int4_kernel_weight.default, (packed,), origin=node, suffix=".kernel_weight"
    )
    scales = call(
        node,
        cpu.int4_kernel_scales.default,
        (scale, zero_point),
        origin=node,
        suffix=".kernel_scales",
    )
    stored = (packed, scale, zero_point)
    args = (node.args[0], weight, scales, *stored, group_size, _bias(node), choice.few_tokens)
    return call(node, cpu.int4_linear.default, args, origin=node)


def _dequantized(node: fx.Node, choice: Choice) -> fx.Node:
    dtype = torch.float32 if choice.precision == "float32" else torch.bfloat16
    if node.args[1].target is binary.dequantize_binary:
        weight = node.args[1].args[:-1]
        args = (node.args[0], *weight, _bias(node), dtype)
        return call(node, cpu.binary_linear.default, args, origin=node)
    codes, scale, zero_point, group_size, _ = node.args[1].args
    stored = codes.args[0] if codes.target is panguq.unpack_int4.default else codes
    args = (node.args[0], stored, scale, zero_point, group_size, _bias(node), dtype)
    return call(node, cpu.dequantized_linear.default, args, origin=node)


_LOWERINGS = {
    "int8_linear": _int8,
    "int8_weight_linear": _int8_weight,
    "int4_linear": _int4,
    "dequantized_linear": _dequantized,
}
