"""Put quantize/dequantize pairs where the schemes want quantized values."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from panguq.ir.edit import call, free_name, get_tensor, label, module_path, tensor_node
from panguq.ir.expert_groups import divide_by_scheme
from panguq.ir.node_meta import meta_of, range_of, scheme_of
from panguq.ir.ops import encode, quantize  # noqa: F401  (register the quantize ops)
from panguq.ir.properties import Property
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.run.interpret import ensure_finite
from panguq.ir.views import DequantizedWeight, ExpertLinear, Linear
from panguq.passes.codes.static_scales import affine
from panguq.passes.codes.weight_scales import min_max_scale
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Table, matmuls
from panguq.tensors.folded_weight import materialized

panguq = torch.ops.panguq


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Before: `linear(x, w)`.  After: `linear(dequantize(quantize(x)), dequantize(quantize(w)))`.

    - per tensor, static: `scale = (high - low) / (qmax - qmin)` and
      `zero_point = round(qmin - low / scale)` from the observed range, which is widened to hold
      zero; symmetric: `scale = max(|low|, |high|) / qmax`, zero point 0.
      In a 16-bit model the scale is one of its dtype's values, see `storable_scale`.
    - per token, dynamic: the scale is computed by the graph, `amax|x| / qmax` for each token,
      times the clip that flatquant learned.
    - a format of other numbers than integers (FP8): `decode(encode(x))` in that format.
    - weights, per channel or group: from the smallest and largest weight of the group.
    Matmuls that read one tensor share its quantize node. Experts of one matmul that differ in
    scheme become a matmul for each scheme, and the sum of these.
    """

    name: ClassVar[str] = "insert-fake-quant"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.SCHEMES, Property.FLOAT_MATMULS})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.QDQ, Property.UNSOLVED})
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT_MATMULS})

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """Observed ranges, if any scheme of the recipe quantizes activations statically."""
        static = any(p.has_static_activation for p in earlier)
        return self.requires | ({Property.CALIBRATED} if static else set())

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        quantized: dict[tuple[fx.Node, QuantSpec], fx.Node] = {}
        weights: dict[tuple[str, QuantSpec], DequantizedWeight] = {}
        rows = []
        for node in matmuls(gm):
            divide_by_scheme(gm, node, ctx.store.empty)
        for node in matmuls(gm):
            scheme, matmul = scheme_of(node), Linear.of(node)
            if scheme.weight is None:
                continue
            if scheme.activation is not None:
                key = (matmul.input, scheme.activation)
                if key not in quantized:
                    quantized[key] = _quantize_input(matmul, scheme.activation)
                matmul.read_input(quantized[key])
            shared = (matmul.weight_name, scheme.weight)
            if shared not in weights:
                clash = any(name == shared[0] for name, _ in weights)
                stem = f"{shared[0]}.{scheme.name}" if clash else shared[0]
                made = _quantize_stored_weight(gm, ctx, matmul, scheme.weight, stem)
                weights[shared] = DequantizedWeight.of(made)
            matmul.read_weight(weights[shared].node)
            scale = get_tensor(gm, str(weights[shared].scale.target))
            rows.append((label(node), scheme.name, float(scale.min()), float(scale.max())))
            result.changed += 1
        columns = ("matmul", "scheme", "smallest_weight_scale", "largest_weight_scale")
        result.tables["quantized"] = Table(columns, tuple(rows))
        return result


def _quantize_input(matmul: Linear, spec: QuantSpec) -> fx.Node:
    """The dequantized value that stands for the matmul's input from here on."""
    node, source = matmul.node, matmul.input
    dtype = source.meta["val"].dtype
    zero = None
    if not spec.is_integer:
        return _encode_input(matmul, spec, dtype)
    if spec.dynamic:
        pair = call(
            node,
            panguq.quantize_per_token.default,
            (source, spec.quant_max, *_clip(node)),
            origin=source,
            suffix=".quantize_per_token",
        )
        codes = call(node, operator.getitem, (pair, 0), origin=source, suffix=".codes")
        scale = call(node, operator.getitem, (pair, 1), origin=source, suffix=".scale")
    else:
        low, high = range_of(node)
        step, offset = affine(low, high, spec, dtype)
        path = module_path(node)
        gm = node.graph.owning_module
        assert gm is not None
        dot = "." if ExpertLinear.match(node) is None else "_"  # experts' path is a weight's name
        name = free_name(gm, f"{path}{dot}input_scale".lstrip("."))
        scale = tensor_node(node, name, torch.tensor([step]))
        offset_tensor = torch.tensor([offset], dtype=torch.int32)
        zero = tensor_node(node, name.replace("input_scale", "input_zero_point"), offset_tensor)
        codes = call(
            node,
            panguq.quantize_per_tensor.default,
            (source, scale, zero, spec.quant_min, spec.quant_max),
            origin=source,
            suffix=".quantize_per_tensor",
        )
    return call(
        node,
        panguq.dequantize.default,
        (codes, scale, zero, dtype),
        origin=source,
        suffix=f".dequantize_{spec.granularity}",
    )


def _clip(matmul: fx.Node) -> tuple[float, ...]:
    """What a token's largest magnitude is multiplied by, where that was learned."""
    clip = meta_of(matmul).input_clip
    return () if clip is None else (clip,)


def _encode_input(matmul: Linear, spec: QuantSpec, dtype: torch.dtype) -> fx.Node:
    """`_quantize_input` in a format whose codes are no integers."""
    node, source, name = matmul.node, matmul.input, spec.format.name
    op = panguq.encode_per_token.default
    pair = call(node, op, (source, name), origin=source, suffix=".encode_per_token")
    codes = call(node, operator.getitem, (pair, 0), origin=source, suffix=".codes")
    scale = call(node, operator.getitem, (pair, 1), origin=source, suffix=".scale")
    args = (codes, scale, name, dtype)
    return call(
        node, panguq.decode_per_token.default, args, origin=source, suffix=".decode_per_token"
    )


def _quantize_stored_weight(
    gm: fx.GraphModule, ctx: PassContext, matmul: Linear, spec: QuantSpec, stem: str
) -> fx.Node:
    """The dequantized weight of a matmul; `stem` names the scales that are stored for it."""
    node, stored = matmul.node, matmul.weight
    weight = materialized(get_tensor(gm, matmul.weight_name))
    ensure_finite(matmul.weight_name, weight)
    group_size = spec.group_size_for(weight.shape[-1])
    scale, zero_point = min_max_scale(weight, group_size, spec)
    scale_node = tensor_node(node, f"{stem}_scale", ctx.store.put(scale))
    if not spec.is_integer:
        grid = (scale_node, group_size, spec.format.name)
        op, back = panguq.encode_weight.default, panguq.decode_weight.default
        codes = call(node, op, (stored, *grid), origin=node, suffix=".weight_codes")
        return call(node, back, (codes, *grid, weight.dtype), origin=node, suffix=".weight")
    zero_node = None
    if zero_point is not None:
        zero_node = tensor_node(node, f"{stem}_zero_point", ctx.store.put(zero_point))
    codes = call(
        node,
        panguq.quantize_weight.default,
        (stored, scale_node, zero_node, group_size, spec.quant_min, spec.quant_max),
        origin=node,
        suffix=".weight_codes",
    )
    return call(
        node,
        panguq.dequantize_weight.default,
        (codes, scale_node, zero_node, group_size, weight.dtype),
        origin=node,
        suffix=".weight",
    )
