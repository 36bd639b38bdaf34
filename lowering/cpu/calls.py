"""How a fake-quant matmul is written in the kernels of the CPU target."""

from __future__ import annotations

import torch
from torch import fx

from panguq.errors import LoweringError
from panguq.ir.edit import call, label, op_name
from panguq.ir.ops import binary  # noqa: F401  (registers dequantize_binary)
from panguq.ir.views import (
    BinaryWeight,
    DequantizedWeight,
    ExpertLinear,
    Linear,
    QuantizedInput,
)
from panguq.kernels.cpu import (  # noqa: F401  (registers torch.ops.panguq_cpu.*)
    binary_linear,
    dequantized_linear,
    expert_linear,
    int4_linear,
    int8_linear,
    int8_weight_linear,
)
from panguq.lowering.choice import Choice

panguq = torch.ops.panguq
cpu = torch.ops.panguq_cpu


def lower_on_cpu(node: fx.Node, choice: Choice) -> fx.Node:
    """The call of the chosen kernel, in front of `node`."""
    return _LOWERINGS[choice.kernel](node, choice)


def _int8(node: fx.Node, choice: Choice) -> fx.Node:
    linear = Linear.of(node)
    x, weight = QuantizedInput.of(linear.input), DequantizedWeight.of(linear.weight)
    sums = None
    if x.zero_point is not None:
        sums = call(
            node, cpu.weight_row_sums.default, (weight.codes,), origin=node, suffix=".row_sums"
        )
    args = (x.codes, x.scale, x.zero_point, weight.codes, weight.scale, sums, linear.bias, x.dtype)
    return _call(node, "int8_linear", args)


def _int8_weight(node: fx.Node, choice: Choice) -> fx.Node:
    linear = Linear.of(node)
    weight = DequantizedWeight.of(linear.weight)
    args = (linear.input, weight.codes, weight.scale, linear.bias, choice.few_tokens)
    return _call(node, "int8_weight_linear", args)


def _int4(node: fx.Node, choice: Choice) -> fx.Node:
    linear = Linear.of(node)
    stored = DequantizedWeight.of(linear.weight)
    if not stored.is_packed:
        raise LoweringError(
            f"{label(node)}: int4_linear cannot read what {op_name(stored.codes)} does",
            "this is a defect of the choice of kernels; please report it",
        )
    weight_op, scales_op = cpu.int4_kernel_weight.default, cpu.int4_kernel_scales.default
    if ExpertLinear.match(node) is not None:
        weight_op = cpu.expert_int4_kernel_weight.default
        scales_op = cpu.expert_int4_kernel_scales.default
    weight = call(node, weight_op, (stored.packed,), origin=node, suffix=".kernel_weight")
    pair = (stored.scale, stored.zero_point)
    scales = call(node, scales_op, pair, origin=node, suffix=".kernel_scales")
    grid = (stored.scale, stored.zero_point, stored.group_size)
    args = (linear.input, weight, scales, stored.packed, *grid, linear.bias, choice.few_tokens)
    return _call(node, "int4_linear", args)


def _dequantized(node: fx.Node, choice: Choice) -> fx.Node:
    dtype = torch.float32 if choice.precision == "float32" else torch.bfloat16
    linear = Linear.of(node)
    signs = BinaryWeight.match(linear.weight)
    if signs is not None:
        args = (linear.input, *signs.stored, linear.bias, dtype)
        return call(node, cpu.binary_linear.default, args, origin=node)
    weight = DequantizedWeight.of(linear.weight)
    stored = (weight.packed, weight.scale, weight.zero_point, weight.group_size)
    args = (linear.input, *stored, linear.bias, dtype)
    return _call(node, "dequantized_linear", args)


def _call(node: fx.Node, kernel: str, args: tuple[object, ...]) -> fx.Node:
    """The call of a kernel, or of its twin for experts, which also takes each one's rows."""
    experts = ExpertLinear.match(node)
    if experts is not None:
        kernel, args = f"expert_{kernel}", (*args, experts.counts)
        args = args if experts.members is None else (*args, list(experts.members))
    return call(node, getattr(cpu, kernel).default, args, origin=node)


_LOWERINGS = {
    "int8_linear": _int8,
    "int8_weight_linear": _int8_weight,
    "int4_linear": _int4,
    "dequantized_linear": _dequantized,
}
