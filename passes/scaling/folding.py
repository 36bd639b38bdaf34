"""What all passes share that move a scale per channel from activations into weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx

from panguq.errors import NumericsError, RecipeError
from panguq.ir.analysis.channels import KINDS, ScaleSite, find_scale_sites
from panguq.ir.analysis.walk import uncast
from panguq.ir.canonical_views import weight_offsets
from panguq.ir.edit import get_tensor, label, set_tensor
from panguq.passes.pipeline.base import PassContext, PassResult, Region
from panguq.suggest import did_you_mean
from panguq.tensors.folded_weight import FoldedWeight, materialized

DEFERRED_BYTES = 1 << 20

Factors = dict[str, dict[int, Tensor]]
"""Float64 factors `[size of the axis]` to multiply a weight with, by weight name and axis."""


def check_kinds(pass_name: str, kinds: Iterable[str]) -> None:
    """Raises RecipeError for a kind of site that does not exist."""
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(
                f"{pass_name}: unknown kind of site {kind!r:.80}",
                did_you_mean(str(kind), KINDS, "kinds"),
            )


def choose_sites(
    gm: fx.GraphModule,
    ctx: PassContext,
    result: PassResult,
    kinds: Sequence[str],
    refuse: Callable[[ScaleSite], str | None],
) -> list[ScaleSite]:
    """The sites of these kinds, in graph order; all others are skipped with their reason.

    `refuse` gives the reason why a site is not wanted, or None.
    """
    found, blocked = find_scale_sites(gm, ctx.interface)
    for item in blocked:
        result.skip(item.node, item.reason)
    chosen = []
    for site in found:
        if site.kind not in kinds:
            result.skip(site.source, f"sites of kind {site.kind} are not selected")
        elif reason := refuse(site):
            result.skip(site.source, reason)
        else:
            chosen.append(site)
    return chosen


def storable_factors(gm: fx.GraphModule, site: ScaleSite, scale: Tensor) -> Tensor:
    """`scale` `[channels]`, moved to where norm weights with an offset have numbers.

    A norm with the gain `1 + w` stores `g / s - 1` for the gain g. Near -1 the steps of bfloat16
    are as large as they are near 1, a large part of a small gain: so s becomes the scale that the
    rounded weight stands for, g / (1 + w). Where that gain would be 0, s is 1.
    """
    offsets = weight_offsets(gm)
    result = scale.clone()
    for edit in site.edits:
        offset = offsets.get(edit.weight)
        if offset is None or len(edit.channel.unique()) < len(edit.channel):
            continue
        used = edit.channel >= 0
        weight = get_tensor(gm, edit.weight)[used]
        gain, wanted = weight.double() + offset, scale[edit.channel[used]].double()
        made = (gain / wanted - offset).to(weight.dtype).double() + offset
        exact = torch.where(gain * made > 0, gain / made, 1.0)
        result[edit.channel[used]] = torch.where(gain == 0, wanted, exact)
    return result


def add_factors(site: ScaleSite, scale: Tensor, factors: Factors) -> None:
    """Note what `scale` `[channels]` does to every weight of the site."""
    for edit in site.edits:
        factor = torch.where(edit.channel < 0, 1.0, scale[edit.channel.clamp_min(0)])
        factor = factor if edit.multiply else 1 / factor
        by_axis = factors.setdefault(edit.weight, {})
        so_far = by_axis.get(edit.axis)
        by_axis[edit.axis] = factor if so_far is None else so_far * factor


def fold(gm: fx.GraphModule, ctx: PassContext, factors: Factors, pass_name: str) -> None:
    """Multiply every weight by its factors, in float64 and rounded once.

    Where a norm has the gain `weight + offset`, that is multiplied. Large weights are computed only
    when they are read. Raises NumericsError where a weight's dtype overflows.
    """
    offsets = weight_offsets(gm)
    for name, by_axis in factors.items():
        weight = get_tensor(gm, name)
        if name in offsets:
            gain = weight.double() + offsets[name]
            scaled = (gain * by_axis[0] - offsets[name]).to(weight.dtype)
            set_tensor(gm, name, ctx.store.put(scaled))
            continue
        folded = FoldedWeight(weight, by_axis)
        if _may_overflow(weight, by_axis) and not materialized(folded).isfinite().all():
            raise NumericsError(
                f"{pass_name}: weight {name} overflows {folded.dtype} when it takes up the scales",
                "choose milder scales, such as a smaller alpha, or compile in bfloat16",
            )
        small = folded.nbytes < DEFERRED_BYTES
        set_tensor(gm, name, ctx.store.put(materialized(folded)) if small else folded)


def _may_overflow(weight: Tensor, by_axis: dict[int, Tensor]) -> bool:
    bound = max(abs(float(end)) for end in torch.aminmax(weight))
    for factor in by_axis.values():
        bound *= float(factor.abs().max())
    return not bound < torch.finfo(weight.dtype).max / 2


def regions(gm: fx.GraphModule, sites: Sequence[ScaleSite]) -> list[Region]:
    """What each site rewrote, as functions whose inputs and outputs no site rescales.

    Where one site's consumer is another's source (norm ─► v_proj ─► o_proj) the value between
    them is rescaled, so both make one region.
    """
    found: list[tuple[set[fx.Node], set[fx.Node]]] = []  # nodes computed, values rescaled
    for site in sites:
        nodes, rescaled = {c.linear for c in site.consumers}, set(site.values)
        for other in [r for r in found if r[0] & rescaled or r[1] & nodes]:
            found.remove(other)
            nodes, rescaled = nodes | other[0], rescaled | other[1]
        found.append((nodes | {v for v in rescaled if v.op == "call_function"}, rescaled))
    order = {node: i for i, node in enumerate(gm.graph.nodes)}

    def labels_of(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
        return tuple(label(n) for n in sorted(nodes, key=order.__getitem__))

    closed = []
    for nodes, rescaled in found:
        read = {uncast(node, source)[1] for node in nodes for source in node.all_input_nodes}
        sizes = {n for n in read if isinstance(n.meta["val"], torch.SymInt)}
        inputs = {n for n in read - nodes - sizes if n.op != "get_attr"}
        closed.append(Region(labels_of(inputs), labels_of(nodes - rescaled)))
    return closed
