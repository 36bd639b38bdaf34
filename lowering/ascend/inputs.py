"""The inputs of Ascend matmuls: flattened to `[m, k]`, quantized once for all that read them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from panguq.errors import LoweringError
from panguq.ir.call_arguments import arguments
from panguq.ir.canonical_views import Kronecker
from panguq.ir.edit import call, free_name, get_tensor, label, tensor_node, value_types
from panguq.ir.number_format import INT4, INT8, NumberFormat
from panguq.ir.views import Linear, QuantizedInput
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.chip import Chip
from panguq.kernels.ascend.limits import CODES_PER_WORD
from panguq.kernels.ascend.vendor import ops as npu_ops  # noqa: F401  (registers the ops)
from panguq.kernels.ascend.vendor.contracts import check_call
from panguq.kernels.ascend.vendor.dtypes import dtype_number
from panguq.tensors.weight_store import WeightStore

aten = torch.ops.aten
npu = torch.ops.npu
panguq = torch.ops.panguq


@dataclass
class AscendInputs:
    """Makes the nodes of one graph that matmuls read; `made` holds those that are shared."""

    gm: fx.GraphModule
    store: WeightStore
    chip: Chip = ATLAS_A2
    made: dict[tuple[fx.Node, str], tuple[Any, ...]] = field(default_factory=dict)

    def flat(self, node: fx.Node, x: fx.Node) -> fx.Node:
        """x as `[m, k]`."""
        if x.meta["val"].dim() == 2:
            return x
        key = (x, "flat")
        if key not in self.made:
            flat = call(
                node,
                aten.reshape.default,
                (x, [-1, int(x.meta["val"].shape[-1])]),
                origin=x,
                suffix=".flat",
            )
            self.made[key] = (flat,)
        return self.made[key][0]

    def quantize_static(self, node: fx.Node) -> fx.Node:
        """int8 codes `[m, k]` of the matmul's statically quantized input."""
        given = QuantizedInput.of(Linear.of(node).input)
        key = (given.quantizer, "static")
        if key not in self.made:
            source, zero_point = given.source, given.zero_point
            assert zero_point is not None  # a static activation has one, be it 0
            dtype = source.meta["val"].dtype
            factor = get_tensor(self.gm, str(given.scale.target)).reciprocal().to(dtype)
            zero = get_tensor(self.gm, str(zero_point.target)).to(dtype)
            stem = str(given.scale.target).removesuffix("input_scale")
            args = (
                source,
                self.small(node, f"{stem}input_factor", factor),
                self.small(node, f"{stem}input_offset", zero),
                dtype_number(torch.qint8),
                -1,
                False,
            )
            codes = call(
                node, npu.npu_quantize.default, args, origin=source, suffix=".npu_quantize"
            )
            self.made[key] = (self.flat(node, codes),)
        return self.made[key][0]

    def quantize_dynamic(self, node: fx.Node, format: NumberFormat) -> tuple[fx.Node, fx.Node]:
        """Codes `[m, k]` (int8, or int32 of eight 4-bit codes) and float32 scales `[m]`."""
        given = QuantizedInput.of(Linear.of(node).input)
        key = (given.quantizer, "dynamic")
        if key not in self.made:
            source, turned = given.source, Kronecker.match(given.source)
            clip = float(arguments(given.quantizer).get("clip", 1.0))
            if turned is not None and format == INT4:
                pair = self._quantize_turned(node, turned, clip)
            elif clip != 1.0:
                raise LoweringError(
                    f"{label(given.quantizer)}: npu_dynamic_quant clips no token",
                    "leave flatquant out of the recipe",
                )
            else:
                named = {} if format == INT8 else {"dst_type": dtype_number(torch.quint4x2)}
                op = npu.npu_dynamic_quant.default
                pair = call(node, op, (source,), named, origin=source, suffix=".npu_dynamic_quant")
            codes = call(node, operator.getitem, (pair, 0), origin=source, suffix=".npu_codes")
            scale = call(node, operator.getitem, (pair, 1), origin=source, suffix=".npu_scale")
            if scale.meta["val"].dim() != 1:
                scale = call(node, aten.view.default, (scale, [-1]), origin=scale, suffix=".flat")
            if turned is not None and format == INT4:  # the codes are those of [m, a, b]
                shape = [-1, int(source.meta["val"].shape[-1]) // CODES_PER_WORD]
                flat = call(node, aten.view.default, (codes, shape), origin=codes, suffix=".flat")
                self.made[key] = (flat, scale)
            else:
                self.made[key] = (self.flat(node, codes), scale)
        codes, scale = self.made[key]
        return codes, scale

    def _quantize_turned(self, node: fx.Node, turned: Kronecker, clip: float) -> fx.Node:
        """Codes and scales of a value that a Kronecker product turns, in one call."""
        left = get_tensor(self.gm, str(turned.left.target))
        sizes = (len(left), int(turned.right.meta["val"].shape[0]))
        shape = [-1, *sizes]
        runs = call(
            node, aten.reshape.default, (turned.x, shape), origin=turned.node, suffix=".runs"
        )
        first = self.small(node, f"{turned.left.target}_t", left.T)
        args = (runs, first, turned.right, clip)
        op = npu.npu_kronecker_quant.default
        check_call(op, value_types(args), {}, label(turned.node), self.chip)
        return call(node, op, args, origin=turned.node, suffix=".npu_kronecker_quant")

    def small(self, node: fx.Node, name: str, tensor: Tensor) -> fx.Node:
        """A small operand, stored under a free name and read in front of `node`."""
        name = free_name(self.gm, name)
        return tensor_node(node, name, self.store.put(tensor.contiguous()))

    def leading_sizes(self, node: fx.Node, source: fx.Node) -> tuple[Any, ...]:
        """The sizes of `source` without the last: numbers, or nodes where they are symbolic."""
        turned = Kronecker.match(source)
        source = source if turned is None else turned.x  # of the same sizes, and it stays
        key = (source, "sizes")
        if key not in self.made:
            self.made[key] = tuple(
                call(node, aten.sym_size.int, (source, axis), origin=source, suffix=f".size_{axis}")
                if isinstance(size, torch.SymInt)
                else int(size)
                for axis, size in enumerate(source.meta["val"].shape[:-1])
            )
        return self.made[key]
