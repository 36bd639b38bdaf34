"""How fake-quant matmuls of experts are written as npu_grouped_matmul.

Weights stay stored as `[experts, n, k]`; what the op reads, `[experts, k, n]`, is made of them by
nodes that depend only on weights and are run once, at loading. Rows are divided by where each
expert's end, which fuse-ascend takes from the op that routes them; int8 x int4 alone reads counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from panguq.ir.call_arguments import calls, operand
from panguq.ir.edit import call, get_tensor
from panguq.ir.node_meta import scheme_of
from panguq.ir.number_format import INT4, INT8
from panguq.ir.views import DequantizedWeight, ExpertLinear
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.own import int4_weight  # noqa: F401  (registers the ops)
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.kernels.ascend.vendor.format_cast import FRACTAL_NZ
from panguq.kernels.ascend.vendor.grouped_matmul_rules import COUNTS, CUMULATIVE
from panguq.lowering.ascend.fusions.experts import grouped_call
from panguq.lowering.ascend.inputs import AscendInputs
from panguq.lowering.problem import WeightFormat

aten = torch.ops.aten
npu = torch.ops.npu
panguq = torch.ops.panguq
own = torch.ops.panguq_npu


@dataclass
class ExpertCalls:
    """Writes the grouped matmuls of one graph; rows that several read are quantized once."""

    gm: fx.GraphModule
    inputs: AscendInputs
    chip: Chip

    def lower(self, node: fx.Node, weight_format: WeightFormat) -> fx.Node:
        """The matmuls of all experts, `[r, n]`."""
        scheme, given = scheme_of(node), ExpertLinear.of(node)
        dtype = node.meta["val"].dtype
        if scheme.activation is None:
            x, named, kind = given.input, self._weight_only(node, dtype), CUMULATIVE
        else:
            x, per_token = self.inputs.quantize_dynamic(node, INT8)
            packed = scheme.weight is not None and scheme.weight.format == INT4
            named = self._int4(node) if packed else self._int8(node, dtype)
            named |= {"per_token_scale": [per_token], "output_dtype": dtype_number(dtype)}
            kind = COUNTS if packed else CUMULATIVE
        rows = given.counts
        if kind == CUMULATIVE:
            rows = call(node, aten.cumsum.default, (rows, 0), origin=node, suffix=".ends")
        named |= {"group_list": rows, "group_list_type": kind}
        return grouped_call(node, x, self._weight(node, weight_format), named, self.chip)

    # --- operands -------------------------------------------------------------------------------

    def _weight_only(self, node: fx.Node, dtype: torch.dtype) -> dict[str, Any]:
        """Scales `[experts, n]` or `[experts, k / g, n]` and what is added to codes, maybe 0."""
        given = DequantizedWeight.of(ExpertLinear.of(node).weight)
        scale = _kernel_layout(self._stored(given.scale)).to(dtype)
        offset = torch.zeros_like(scale)
        if given.zero_point is not None:
            offset = -_kernel_layout(self._stored(given.zero_point)).to(dtype)
        return {
            "antiquant_scale": [self._small(node, given, "antiquant_scale", scale)],
            "antiquant_offset": [self._small(node, given, "antiquant_offset", offset)],
            **self._bias(node, torch.float32 if dtype == torch.bfloat16 else dtype),
        }

    def _int8(self, node: fx.Node, dtype: torch.dtype) -> dict[str, Any]:
        """Scales `[experts, n]`: of bfloat16 models in bfloat16, as which they were chosen."""
        given = DequantizedWeight.of(ExpertLinear.of(node).weight)
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        scale = _kernel_layout(self._stored(given.scale)).to(wide)
        return {
            "scale": [self._small(node, given, "npu_scale", scale)],
            **self._bias(node, torch.bfloat16),
        }

    def _int4(self, node: fx.Node) -> dict[str, Any]:
        """int64 scales `[experts, 1 or k / 256, n]` and the bias `8 * sum_k(code * scale)`.

        The scales are bfloat16 numbers: one of the op's two kernels rounds others down to such.
        """
        given = DequantizedWeight.of(ExpertLinear.of(node).weight)
        scale = self._stored(given.scale).float().transpose(1, 2).contiguous()
        codes = self._stored(given.codes)
        sums = codes.unflatten(-1, (scale.shape[1], -1)).sum(-1, dtype=torch.int32)
        bias = 8 * (sums.transpose(1, 2).double() * scale.double()).sum(1).float()
        bits = scale.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        return {
            "scale": [self._small(node, given, "npu_scale", bits)],
            "bias": [self._small(node, given, "npu_bias", bias)],
        }

    def _bias(self, node: fx.Node, dtype: torch.dtype) -> dict[str, Any]:
        bias = ExpertLinear.of(node).bias
        if bias is None:
            return {}
        if bias.meta["val"].dtype != dtype:
            stored = get_tensor(self.gm, str(bias.target)).to(dtype)
            bias = self.inputs.small(node, f"{bias.target}_npu", stored)
        return {"bias": [bias]}

    def _weight(self, node: fx.Node, weight_format: WeightFormat) -> fx.Node:
        """The stored codes as the op reads them: int8 `[experts, k, n]`, int32 `[.., n / 8]`."""
        given = DequantizedWeight.of(ExpertLinear.of(node).weight)
        experts, n, k = (int(size) for size in given.codes.meta["val"].shape)

        def make(op: Any, args: tuple[Any, ...], suffix: str, **named: Any) -> fx.Node:
            return call(node, op, args, named, origin=node, suffix=suffix)

        if given.is_packed:
            # Words hold outputs, so that those of all experts can be made as if of one.
            rows = make(aten.view.default, (given.packed, [experts * n, k // 2]), ".rows")
            words = make(own.int4_weight.default, (rows,), ".words")
            shape = [k, experts, n // CODES_PER_WORD]
            stacked = make(aten.view.default, (words, shape), ".stacked")
            turned = make(aten.transpose.int, (stacked, 0, 1), ".turned")
        else:
            turned = make(aten.transpose.int, (given.packed, 1, 2), ".turned")
        contiguous = {"memory_format": torch.contiguous_format}
        laid_out = make(aten.clone.default, (turned,), ".kernel_weight", **contiguous)
        if weight_format == "ND":
            return laid_out
        return make(npu.npu_format_cast.default, (laid_out, FRACTAL_NZ), ".kernel_weight_nz")

    def _stored(self, node: fx.Node) -> Tensor:
        if calls(node, "panguq::unpack_int4"):
            return panguq.unpack_int4(get_tensor(self.gm, str(operand(node, 0).target)))
        return get_tensor(self.gm, str(node.target))

    def _small(
        self, node: fx.Node, weight: DequantizedWeight, what: str, tensor: Tensor
    ) -> fx.Node:
        return self.inputs.small(node, f"{weight.scale.target}_{what}", tensor)


def _kernel_layout(scales: Tensor) -> Tensor:
    """`[experts, n, k / g]` as the op reads it: `[experts, k / g, n]`, or `[experts, n]`."""
    return scales.squeeze(-1) if scales.shape[-1] == 1 else scales.transpose(1, 2).contiguous()
