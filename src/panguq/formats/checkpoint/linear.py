"""A linear with quantized weights, as checkpoint formats store it, read from a fake-quant graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, fx

from panguq.errors import ExportError
from panguq.ir.call_arguments import arguments, calls, operand
from panguq.ir.canonical_views import Kronecker
from panguq.ir.edit import get_tensor
from panguq.ir.node_meta import meta_of
from panguq.ir.number_format import INT4
from panguq.ir.ops import packing, quantize  # noqa: F401  (register the ops matched here)
from panguq.ir.quant_spec import SCHEMES, Scheme
from panguq.ir.views import DequantizedWeight, Item, Linear, QuantizedInput
from panguq.models.hub_names import WeightPart
from panguq.passes.patterns.matching import through_casts

panguq = torch.ops.panguq


class LinearForm(Protocol):
    """What formats ask of a quantized linear, whether it is made or planned. `shape` is `[n, k]`,
    `group_size` the inputs for each scale (k: one for each output); `is_expert`: of a mixture;
    `split`: the sizes of the Kronecker factors that its input is multiplied by, if it is."""

    @property
    def path(self) -> str: ...
    @property
    def scheme(self) -> Scheme: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def group_size(self) -> int: ...
    @property
    def has_bias(self) -> bool: ...
    @property
    def has_zero_point(self) -> bool: ...
    @property
    def is_expert(self) -> bool: ...
    @property
    def split(self) -> tuple[int, int] | None: ...


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """A linear of the source model with quantized weights: `x @ W.T + bias`, W `[n, k]`.

    `W = (codes - weight_zero_point) * weight_scale`, one scale for `group_size` inputs (k: one
    for each output), computed in float32 and rounded to `dtype`, the model's own. A symmetric scale
    may be negative. `input_scale` float32 `[1]` and `input_zero_point` int32 `[1]` belong only to
    static activations; linears that read one tensor have them in common.
    """

    path: str
    scheme: Scheme
    stored: Tensor
    """As the graph has them: int8 `[n, k]`, two 4-bit codes a byte, uint8 `[n, k / 2]`, or codes of
    2, 3, 5, 6 or 7 bits one after the other, uint8 (`pack_codes`)."""
    weight_scale: Tensor
    """Float32, or bfloat16 for 4-bit codes, `[n, k / group_size]`."""
    weight_zero_point: Tensor | None
    """int8 `[n, k / group_size]`; None where the scheme is symmetric."""
    group_size: int
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype
    is_expert: bool = False
    left: Tensor | None = None
    """A Kronecker product's factors `[a, a]` and `[b, b]` in front of the input's quantizer."""
    right: Tensor | None = None
    clip: float = 1.0
    """Of a dynamic input: what a token's largest magnitude is multiplied by."""

    @property
    def shape(self) -> tuple[int, int]:
        """[n, k] of the weight."""
        n, groups = self.weight_scale.shape[-2:]
        return n, groups * self.group_size

    @property
    def has_bias(self) -> bool:
        """Whether a bias is added."""
        return self.bias is not None

    @property
    def has_zero_point(self) -> bool:
        """Whether the weight's codes have zero points."""
        return self.weight_zero_point is not None

    @property
    def split(self) -> tuple[int, int] | None:
        """The sizes of the Kronecker factors in front; None where there are none."""
        if self.left is None or self.right is None:
            return None
        return len(self.left), len(self.right)

    def codes(self) -> Tensor:
        """The weight's codes, int8 `[n, k]`; a new tensor where they are stored packed."""
        if self.stored.dtype != torch.uint8:
            return self.stored
        weight = self.scheme.weight
        if weight is None or weight.format == INT4:
            return panguq.unpack_int4(self.stored)
        return panguq.unpack_codes(self.stored, weight.bits, self.shape[1])

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that panguq computes with, `[n, k]` in the model's dtype (or another)."""
        return panguq.dequantize_weight(
            self.codes(),
            self.weight_scale,
            self.weight_zero_point,
            self.group_size,
            dtype or self.dtype,
        )


def expert_parts(linear: QuantizedLinear, parts: Iterable[WeightPart]) -> list[QuantizedLinear]:
    """The linears of single experts out of one whose tensors are `[experts, n, ..]`; views of it.

    `parts` are the weights that are published. Raises ExportError for experts with a bias.
    """
    if linear.bias is not None:
        raise ExportError(
            f"{linear.path}: quantized experts with a bias, which no server takes",
            "leave the experts in float, or save in panguq's own format",
        )
    zero = linear.weight_zero_point
    return [
        replace(
            linear,
            path=part.name.removesuffix(".weight"),
            stored=part.of(linear.stored),
            weight_scale=part.of(linear.weight_scale),
            weight_zero_point=None if zero is None else part.of(zero),
            is_expert=True,
        )
        for part in parts
    ]


def reads_float(node: fx.Node) -> bool:
    """Whether a linear's weight is a stored float tensor, as it is or cast."""
    return bool(through_casts(Linear.of(node).weight).op == "get_attr")


def read_linear(gm: fx.GraphModule, path: str, node: fx.Node) -> QuantizedLinear:
    """The quantized linear of the module at `path`, whose op is `node`.

    Raises ExportError where the graph computes something that no checkpoint stores.
    """
    matmul = Linear.of(node)
    weight = DequantizedWeight.match(matmul.weight)
    if weight is None:
        raise _unknown(path, matmul.weight)
    stored = weight.packed
    if calls(stored, "panguq::unpack_codes"):
        stored = operand(stored, 0)
    if stored.op != "get_attr":
        if weight.quantizer is None:
            raise _unknown(path, stored)
        raise ExportError(
            f"{path}: its weight is not stored as codes yet",
            "put quantize-weights at the end of the recipe's passes",
        )
    input_scale, input_zero_point = _static_input(gm, path, matmul.input)
    left, right, clip = _dynamic_input(gm, matmul)
    linear = QuantizedLinear(
        path=path,
        scheme=meta_of(node).scheme or SCHEMES["FLOAT"],
        stored=_stored(gm, stored),
        weight_scale=_stored(gm, weight.scale),
        weight_zero_point=None if weight.zero_point is None else _stored(gm, weight.zero_point),
        group_size=weight.group_size,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        bias=None if matmul.bias is None else _stored(gm, matmul.bias),
        dtype=weight.dtype,
        left=left,
        right=right,
        clip=clip,
    )
    _check_scheme(linear, QuantizedInput.match(matmul.input))
    return linear


def _stored(gm: fx.GraphModule, node: fx.Node) -> Tensor:
    return get_tensor(gm, str(node.target))


def _static_input(
    gm: fx.GraphModule, path: str, source: fx.Node
) -> tuple[Tensor | None, Tensor | None]:
    quantized = QuantizedInput.match(source)
    if quantized is None or Item.match(quantized.codes) is not None:
        return None, None
    if not quantized.is_static or quantized.zero_point is None:
        raise _unknown(path, quantized.codes)
    return _stored(gm, quantized.scale), _stored(gm, quantized.zero_point)


def _dynamic_input(
    gm: fx.GraphModule, matmul: Linear
) -> tuple[Tensor | None, Tensor | None, float]:
    """The factors of a Kronecker product in front of the quantizer, and the quantizer's clip."""
    quantized, turned = QuantizedInput.match(matmul.input), Kronecker.match(matmul.source)
    clip = 1.0 if quantized is None else float(arguments(quantized.quantizer).get("clip", 1.0))
    if turned is None:
        return None, None, clip
    return _stored(gm, turned.left), _stored(gm, turned.right), clip


def _check_scheme(linear: QuantizedLinear, quantized: QuantizedInput | None) -> None:
    """The scheme that passes noted must be what the graph computes, since formats name it."""
    weight, activation = linear.scheme.weight, linear.scheme.activation
    agrees = (
        weight is not None
        and (weight.bits < 8) == (linear.stored.dtype == torch.uint8)
        and weight.symmetric == (linear.weight_zero_point is None)
        and (activation is None) == (quantized is None)
        and (activation is None or activation.dynamic == (linear.input_scale is None))
    )
    if not agrees:
        raise ExportError(
            f"{linear.path}: the graph does not compute its scheme, {linear.scheme.name}",
            "a pass changed the one and not the other",
        )


def _unknown(path: str, node: fx.Node) -> ExportError:
    return ExportError(
        f"{path}: no checkpoint can express {node.name} ({node.target})",
        "compile without the pass that put it there",
    )
