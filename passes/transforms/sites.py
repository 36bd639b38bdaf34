"""Where a matmul's input can go through a Kronecker product, by data flow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.ir.analysis.channels import ScaleSite, find_scale_sites
from panguq.ir.interface import Interface
from panguq.ir.node_meta import is_quantized, scheme_of, weight_spec_of
from panguq.ir.number_format import INT4
from panguq.ir.quant_spec import QuantSpec, Scheme
from panguq.ir.views import ExpertLinear, Linear, by_input
from panguq.passes.pipeline.base import PassResult, matmuls
from panguq.passes.transforms.factors import split_axis


@dataclass(frozen=True, eq=False)
class TransformSite:
    """A value x `[..., a * b]` and the `linears` that are to read it transformed.

    `scales` is the site of `ir/analysis/channels.py` by which x can be divided at no cost; column j
    belongs to its channel `column[j]`, -1 for none.
    """

    x: fx.Node
    linears: tuple[fx.Node, ...]
    split: tuple[int, int]
    scales: ScaleSite | None
    column: Tensor

    @property
    def activation(self) -> QuantSpec:
        """How x is quantized."""
        spec = scheme_of(self.linears[0]).activation
        assert spec is not None
        return spec

    def weight_spec(self, linear: fx.Node) -> QuantSpec:
        """How the weight of one of the linears is."""
        return weight_spec_of(linear)


def find_transform_sites(
    gm: fx.GraphModule, interface: Interface, result: PassResult
) -> list[TransformSite]:
    """The inputs of matmuls whose activations are INT4, in graph order; why others are not."""
    wanted = []
    for node in matmuls(gm):
        if not is_quantized(node):
            continue
        reason = _refusal(gm, node)
        if reason is None:
            wanted.append(node)
        else:
            result.skip(node, reason)
    scales = _scale_sites(gm, interface) if wanted else {}
    found = []
    for x, linears in by_input(wanted).items():
        size = Linear.of(linears[0]).shape[1]
        split = split_axis(size)
        if split is None:
            result.skip(linears[0], f"{size} inputs have no two factors that are small enough")
            continue
        site, column = scales.get(x, (None, torch.full((size,), -1)))
        found.append(TransformSite(x, tuple(linears), split, site, column))
    return found


def takes_a_transform(scheme: Scheme) -> bool:
    """Whether a matmul of this scheme reads 4-bit codes with a scale each token."""
    activation = scheme.activation
    return activation is not None and activation.format == INT4 and activation.dynamic


def _refusal(gm: fx.GraphModule, node: fx.Node) -> str | None:
    if not takes_a_transform(scheme_of(node)):
        return f"its scheme is {scheme_of(node).name}: only 4-bit inputs, a scale each token, gain"
    if ExpertLinear.match(node) is not None:
        return "experts read tokens in parts, and no kernel transforms those"
    if len(Linear.of(node).weight.users) > 1:
        return "its weight is read elsewhere, too"
    return None


def _scale_sites(
    gm: fx.GraphModule, interface: Interface
) -> dict[fx.Node, tuple[ScaleSite, Tensor]]:
    """By value, the site that divides it, where it divides no other value that a linear reads."""
    found: dict[fx.Node, tuple[ScaleSite, Tensor]] = {}
    for site in find_scale_sites(gm, interface)[0]:
        values = {Linear.of(c.linear).input for c in site.consumers}
        if len(values) == 1:
            found[values.pop()] = site, site.consumers[0].channel
    return found
