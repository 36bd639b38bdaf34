"""Replace fake-quant matmuls by the kernel calls of a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from panguq.errors import LoweringError
from panguq.ir.edit import call, erase_unused, label, replace
from panguq.ir.properties import Property
from panguq.kernels.cpu import (  # noqa: F401  (registers torch.ops.panguq_cpu.*)
    dequantized_linear,
    int4_linear,
    int8_linear,
    int8_weight_linear,
)
from panguq.lowering.candidates import MatmulProblem, Precision
from panguq.lowering.select_kernel import Choice, select_kernel
from panguq.lowering.targets import Target, find_target
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.base import Pass, PassContext, PassResult, Table, linears

aten = torch.ops.aten
panguq = torch.ops.panguq
cpu = torch.ops.panguq_cpu


@dataclass(frozen=True)
class LowerMatmuls(Pass):
    """Before: `linear(dequantize(q), dequantize_weight(codes))`.  After: one kernel call on codes.

    - W8A8, static and dynamic: `int8_linear(q, act_scale, zero_point, codes, weight_scale)`.
    - W8A16: `int8_weight_linear(x, codes, weight_scale)`.
    - W4A16: `int4_linear(x, kernel layout of the packed codes)`; the ops that bring the stored
      codes into the kernel's layout depend on weights alone and are run once, at loading.
    A weight-only matmul that neither takes, or one that must not round to bfloat16
    (`precision`), becomes `dequantized_linear`, which takes everything, and says so.
    """

    name: ClassVar[str] = "lower-matmuls"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ, Property.WEIGHT_CODES})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.LOWERED})
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})
    target: str = "cpu"
    precision: Precision = "bfloat16"

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """Fake-quant matmuls on integer codes; nothing where the recipe quantizes nothing."""
        quantizes = any(isinstance(p, AssignSchemes) and p.quantizes for p in earlier)
        return self.requires if quantizes else frozenset({Property.SCHEMES})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        target = find_target(self.target)
        result = PassResult()
        rows: list[tuple[object, ...]] = []
        for node in [n for n in gm.graph.nodes if n.target is aten.linear.default]:
            scheme = node.meta.get("scheme")
            if scheme is None or scheme.is_float:
                continue
            choice = choose(node, target, self.precision)
            if choice.kernel == "dequantized_linear":
                others = "; ".join(f"{kernel}: {why}" for kernel, why in choice.losers)
                result.skip(node, f"no integer kernel: {others}")
            lowered = _LOWERINGS[choice.kernel](node, choice)
            lowered.meta["scheme"] = scheme
            sources = list(node.all_input_nodes)
            replace(node, lowered)
            erase_unused(sources)
            result.changed += 1
            rows.append(_row(lowered, choice))
        columns = ("matmul", "kernel", "few_tokens", "decode_us", "prefill_us", "others")
        result.tables["kernel_choices"] = Table(columns, tuple(rows))
        return result


def choose(node: fx.Node, target: Target, precision: Precision) -> Choice:
    """The kernel for this linear under its scheme."""
    n, k = node.args[1].meta["val"].shape
    problem = MatmulProblem(None, int(n), int(k), node.meta["scheme"], precision)
    return select_kernel(problem, target)


def check_lowerable(gm: fx.GraphModule, lowering: LowerMatmuls) -> None:
    """Raises LoweringError if the target has no kernel for a scheme, before any calibration."""
    target = find_target(lowering.target)
    for node in linears(gm):
        scheme = node.meta.get("scheme")
        if scheme is not None and not scheme.is_float:
            try:
                choose(node, target, lowering.precision)
            except LoweringError as error:
                raise LoweringError(f"{label(node)}: {error.message}", error.hint) from None


def _row(node: fx.Node, choice: Choice) -> tuple[object, ...]:
    others = "; ".join(f"{kernel}: {why}" for kernel, why in choice.losers)
    costs = (f"{choice.decode_us:.0f}", f"{choice.prefill_us:.0f}")
    return (label(node), choice.kernel, choice.few_tokens, *costs, others)


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
    args = (node.args[0], weight, scales, group_size, _bias(node))
    return call(node, cpu.int4_linear.default, args, origin=node)


def _dequantized(node: fx.Node, choice: Choice) -> fx.Node:
    codes, scale, zero_point, group_size, _ = node.args[1].args
    stored = codes.args[0] if codes.target is panguq.unpack_int4.default else codes
    dtype = torch.float32 if choice.precision == "float32" else torch.bfloat16
    args = (node.args[0], stored, scale, zero_point, group_size, _bias(node), dtype)
    return call(node, cpu.dequantized_linear.default, args, origin=node)


_LOWERINGS = {
    "int8_linear": _int8,
    "int8_weight_linear": _int8_weight,
    "int4_linear": _int4,
    "dequantized_linear": _dequantized,
}
