"""How a fake-quant matmul is written in ops of torch_npu and panguq's own kernels.

Weights stay stored as `[n, k]`; what an Ascend kernel reads, `[k, n]`, is made of them by nodes
that depend only on weights and are run once, at loading (see prepack.py). Small operands (scales,
offsets, biases) are stored in the form that the kernel takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.call_arguments import calls, operand
from panguq.ir.edit import call, get_tensor, label, value_types
from panguq.ir.node_meta import scheme_of
from panguq.ir.number_format import INT4, INT8
from panguq.ir.quant_spec import Scheme
from panguq.ir.views import DequantizedWeight, Linear, QuantizedInput
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.limits import W4A8_GROUP
from panguq.kernels.ascend.own import int4_weight  # noqa: F401  (registers the ops)
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers the ops)
from panguq.kernels.ascend.vendor.contracts import check_call
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.format_cast import FRACTAL_NZ
from panguq.lowering.ascend.dispatch import (
    Operands,
    kernel_call,
)
from panguq.lowering.ascend.formats import formats_of
from panguq.lowering.ascend.inputs import AscendInputs
from panguq.lowering.problem import Candidate, WeightFormat
from panguq.tensors.dtypes import dtype_name

aten = torch.ops.aten
npu = torch.ops.npu
panguq = torch.ops.panguq
own = torch.ops.panguq_npu

LARGEST_INT32_BIAS = 2**30  # leaves the other half of int32 to the sum of products


@dataclass
class AscendCalls:
    """Writes the calls of one graph; inputs that several matmuls quantize are quantized once."""

    gm: fx.GraphModule
    inputs: AscendInputs
    chip: Chip = ATLAS_A2

    def lower(
        self,
        node: fx.Node,
        table: Sequence[tuple[int, Candidate]],
        rows: slice,
        weight_format: WeightFormat = "ND",
    ) -> fx.Node:
        """The matmul's outputs `rows`, shaped `[..., rows]`; `table` holds (last m, kernel).

        `weight_format` is that of int8 weights of integer matmuls.
        """
        scheme = scheme_of(node)
        source = Linear.of(node).source
        dtype = node.meta["val"].dtype
        late_bias = None
        if scheme.activation is None:
            given = self._weight_only(node, rows, dtype, table[0][1].storage == "int4_quarters")
        elif scheme.weight is not None and scheme.weight.format == INT4:
            result = self._int4_codes(node, scheme, rows, dtype)
            return self._finish(node, source, result, self._bias(node, rows), rows)
        elif scheme.activation.dynamic:
            given = self._int8_dynamic(node, rows, dtype, weight_format)
        else:
            given, late_bias = self._int8_static(node, rows, dtype, weight_format)
        result = self._matmul(node, given, table, rows)
        return self._finish(node, source, result, late_bias, rows)

    def _matmul(
        self,
        node: fx.Node,
        given: Operands,
        table: Sequence[tuple[int, Candidate]],
        rows: slice,
    ) -> fx.Node:
        for _, kernel in table:
            op, args, named = kernel_call(kernel, given)
            if op.namespace == "npu":
                formats = formats_of(op, args, named)
                check_call(
                    op, value_types(args), value_types(named), label(node), self.chip, formats
                )
        if len(table) > 1:
            args = (given.x, given.weight, given.scale, given.offset, given.pertoken_scale)
            args += (given.bias, given.group_size, given.output_dtype)
            args += ([last for last, _ in table], [str(kernel) for _, kernel in table])
            op, named = panguq.dispatch_matmul.default, {}
        return call(node, op, args, named, origin=node, suffix=f".kernel{_part(rows)}")

    # --- operands -------------------------------------------------------------------------------

    def _weight_only(
        self, node: fx.Node, rows: slice, dtype: torch.dtype, quarters: bool
    ) -> Operands:
        """`quarters`: 4-bit weights in the layout of panguq's own kernels."""
        linear = Linear.of(node)
        weight = DequantizedWeight.of(linear.weight)
        scales = self._rows(weight.scale, rows)
        per_channel = scales.shape[1] == 1
        stored = _kernel_layout(scales, per_channel).to(dtype)
        stem = _stem(weight.scale)
        offset = None
        if weight.zero_point is not None:
            minus = -_kernel_layout(self._rows(weight.zero_point, rows), per_channel).to(dtype)
            offset = self.inputs.small(node, f"{stem}antiquant_offset{_row_name(rows)}", minus)
        bias = self._bias(node, rows, torch.float32 if dtype == torch.bfloat16 else dtype)
        return Operands(
            self.inputs.flat(node, linear.input),
            self._weight(node, weight, rows, quarters=quarters),
            self.inputs.small(node, f"{stem}antiquant_scale{_row_name(rows)}", stored),
            offset,
            None,
            bias,
            0 if per_channel else weight.group_size,
            dtype,
        )

    def _int8_dynamic(
        self, node: fx.Node, rows: slice, dtype: torch.dtype, weight_format: WeightFormat
    ) -> Operands:
        given = DequantizedWeight.of(Linear.of(node).weight)
        x, pertoken_scale = self.inputs.quantize_dynamic(node, INT8)
        stored = self._rows(given.scale, rows).reshape(-1).float()
        name = f"{_stem(given.scale)}npu_scale{_row_name(rows)}"
        weight_scale = self.inputs.small(node, name, stored)
        bias = self._bias(node, rows, torch.float32)
        weight = self._weight(node, given, rows, weight_format)
        return Operands(x, weight, weight_scale, None, pertoken_scale, bias, 0, dtype)

    def _int8_static(
        self, node: fx.Node, rows: slice, dtype: torch.dtype, weight_format: WeightFormat
    ) -> tuple[Operands, fx.Node | None]:
        """Operands, and the bias if it is too large to be folded into the int32 sum.

        deq_scale = act_scale * weight_scale; bias_int32 = round(bias / deq_scale) -
        zero_point * sum_k codes.
        """
        linear = Linear.of(node)
        read, weight = QuantizedInput.of(linear.input), DequantizedWeight.of(linear.weight)
        assert read.zero_point is not None  # a static activation has one, be it 0
        x = self.inputs.quantize_static(node)
        step = get_tensor(self.gm, str(read.scale.target)).double()
        deq_scale = (step * self._rows(weight.scale, rows).reshape(-1).double()).float()
        sums = self._rows(weight.codes, rows).sum(dim=1, dtype=torch.int32)
        folded = -get_tensor(self.gm, str(read.zero_point.target)).long() * sums
        late_bias = None
        if linear.bias is not None:
            steps = (self._rows(linear.bias, rows).double() / deq_scale.double()).round()
            if bool(steps.abs().max() > LARGEST_INT32_BIAS):
                late_bias = self._bias(node, rows, dtype)
            else:
                folded = folded + steps.long()
        stem = _stem(weight.scale)
        if dtype == torch.float16:
            deq_scale = npu.npu_trans_quant_param(deq_scale)
        given = Operands(
            x,
            self._weight(node, weight, rows, weight_format),
            self.inputs.small(node, f"{stem}deq_scale{_row_name(rows)}", deq_scale),
            None,
            None,
            self.inputs.small(node, f"{stem}quant_bias{_row_name(rows)}", folded.to(torch.int32)),
            0,
            dtype,
        )
        return given, late_bias

    def _int4_codes(
        self, node: fx.Node, scheme: Scheme, rows: slice, dtype: torch.dtype
    ) -> fx.Node:
        """W4A8 and W4A4: 4-bit weights times codes of the input.

        W4A8 takes one scale per 256 inputs, which per-channel scales are repeated to, and
        `offset = 8 * sum_k(code * scale)`, as the op documents.
        """
        given = DequantizedWeight.of(Linear.of(node).weight)
        weight = self._weight(node, given, rows)
        scales = self._rows(given.scale, rows).float()
        stem = _stem(given.scale)
        assert scheme.activation is not None
        x, pertoken_scale = self.inputs.quantize_dynamic(node, scheme.activation.format)
        named: dict[str, Any] = {"output_dtype": dtype_number(dtype)}
        if scheme.activation.format == INT4:
            stored = self.inputs.small(
                node, f"{stem}npu_scale{_row_name(rows)}", scales.reshape(-1)
            )
            named |= {"pertoken_scale": pertoken_scale}
        else:
            values = self._rows(given.codes, rows)
            groups = values.shape[1] // W4A8_GROUP
            scales = scales.repeat_interleave(groups // scales.shape[1], dim=1).t().contiguous()
            sums = values.reshape(values.shape[0], groups, W4A8_GROUP).sum(-1, dtype=torch.int32)
            offset = 8 * (sums.t().double() * scales.double()).sum(0).float()
            converted = npu.npu_trans_quant_param(scales.reshape(-1)).reshape(scales.shape)
            stored = self.inputs.small(node, f"{stem}npu_scale{_row_name(rows)}", converted)
            column = call(
                node,
                aten.view.default,
                (pertoken_scale, [-1, 1]),
                origin=node,
                suffix=f".pertoken_scale{_part(rows)}",
            )
            named |= {
                "offset": self.inputs.small(node, f"{stem}npu_offset{_row_name(rows)}", offset),
                "pertoken_scale": column,
                "group_sizes": [0, 0, W4A8_GROUP],  # else aclnn is told 0, which A2 does not list
            }
        args = (x, weight, stored)
        matmul = npu.npu_quant_matmul.default
        formats = formats_of(matmul, args, named)
        check_call(matmul, value_types(args), value_types(named), label(node), self.chip, formats)
        return call(
            node,
            npu.npu_quant_matmul.default,
            args,
            named,
            origin=node,
            suffix=f".kernel{_part(rows)}",
        )

    # --- weights --------------------------------------------------------------------------------

    def _weight(
        self,
        node: fx.Node,
        weight: DequantizedWeight,
        rows: slice,
        weight_format: WeightFormat = "ND",
        quarters: bool = False,
    ) -> fx.Node:
        """The stored codes `[n, k]` as the kernels read them."""
        stored, part = weight.packed, _part(rows)

        def make(op: Any, args: tuple[Any, ...], suffix: str, **named: Any) -> fx.Node:
            return call(node, op, args, named, origin=node, suffix=suffix + part)

        if rows.start is not None:
            stored = make(aten.slice.Tensor, (stored, 0, rows.start, rows.stop), ".weight_rows")
        if weight.is_packed:
            layout = own.int4_quarters.default if quarters else own.int4_weight.default
            return make(layout, (stored,), ".kernel_weight")
        turned = make(aten.t.default, (stored,), ".turned")
        laid_out = make(
            aten.clone.default, (turned,), ".kernel_weight", memory_format=torch.contiguous_format
        )
        if weight_format == "ND":
            return laid_out
        return make(npu.npu_format_cast.default, (laid_out, FRACTAL_NZ), ".kernel_weight_nz")

    def _rows(self, stored: fx.Node, rows: slice) -> Tensor:
        if calls(stored, "panguq::unpack_int4"):
            packed = get_tensor(self.gm, str(operand(stored, 0).target))
            return panguq.unpack_int4(packed[rows])
        return get_tensor(self.gm, str(stored.target))[rows]

    def _bias(self, node: fx.Node, rows: slice, dtype: torch.dtype | None = None) -> fx.Node | None:
        stored = Linear.of(node).bias
        if stored is None:
            return None
        bias = self._rows(stored, rows)
        dtype = dtype or node.meta["val"].dtype
        if rows.start is None and bias.dtype == dtype:
            return stored
        kind = dtype_name(dtype)
        name = f"{stored.target}_{kind}{_row_name(rows)}"
        return self.inputs.small(node, name, bias.to(dtype))

    def _finish(
        self, node: fx.Node, source: fx.Node, result: fx.Node, bias: fx.Node | None, rows: slice
    ) -> fx.Node:
        """The kernel's `[m, n]` as the matmul's `[..., n]`, plus a bias that it could not add."""
        if bias is not None:
            suffix = f".biased{_part(rows)}"
            result = call(node, aten.add.Tensor, (result, bias), origin=node, suffix=suffix)
        shape = [*self.inputs.leading_sizes(node, source), int(result.meta["val"].shape[-1])]
        return call(node, aten.view.default, (result, shape), origin=node, suffix=_part(rows))


def _kernel_layout(scales: Tensor, per_channel: bool) -> Tensor:
    """`[n, k / g]` as the kernels read it: `[k / g, n]`, or `[n]` with one scale an output."""
    return scales.reshape(-1) if per_channel else scales.t()


def _part(rows: slice) -> str:
    return "" if rows.start is None else f".rows_{rows.start}"


def _row_name(rows: slice) -> str:
    return _part(rows).replace(".", "_")


def _stem(scale: fx.Node) -> str:
    """What the names of a matmul's small operands start with: `mlp.down_proj.`"""
    name = str(scale.target)
    return name.removesuffix("weight_scale") if name.endswith("weight_scale") else f"{name}_"
