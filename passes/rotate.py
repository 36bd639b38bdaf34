"""Rotate activations so that no channel stands out, and undo it in the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from panguq.errors import RecipeError
from panguq.ir.analysis.blocks import cuts
from panguq.ir.analysis.choices import chosen_values
from panguq.ir.analysis.rotation_rules import EMBEDDING
from panguq.ir.analysis.rotations import RotationSite, find_rotation_sites, rotated_values
from panguq.ir.edit import ancestors, get_tensor, label, weights_of
from panguq.ir.node_meta import is_quantized
from panguq.ir.properties import Property
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Region, Table
from panguq.passes.rotation.matrices import Rotation, random_rotation
from panguq.passes.rotation.online import ONLINE_KINDS, find_online_sites
from panguq.passes.rotation.weights import WeightPlan
from panguq.suggest import did_you_mean

KINDS = ("residual", "value")
ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class Rotate(Pass):
    """Before: x ─► linear(W).  After: x Q ─► linear(W Q); same function, Q orthogonal.

    Q spreads an outlier of one channel over all, so that few bits serve the activation. Sites of
    `ir/analysis/rotations.py`, x `[..., k]`, weights `[n, k]`:

        residual   embedding W ─► W Q;  what writes to the stream: W ─► Q^T W, b ─► b Q;
                   norm weight g ─► 1;  what reads the norm: W ─► W diag(g) Q
        value      v_proj W ─► (I ⊗ Q)^T W, b ─► b (I ⊗ Q);  o_proj W ─► W (I ⊗ Q), per head

    No new node; caches hold the rotated values. A weight that is read in two roles (tied
    embeddings) becomes two. `online` adds rotations that the graph computes, for what no weight
    can rotate, as a product of two small matrices (`passes/rotation/online.py`):

        down       the input of a matmul that reads a pointwise product or activation (down_proj)
        heads      across the heads of an attention's result, before o_proj

    Q = H diag(+-1) / sqrt(n) with Hadamard matrices H where there are any, otherwise the flattest
    orthogonal matrix that is known (`passes/rotation/matrices.py`); signs from the compile's seed.
    All products are float64, rounded once. Models whose stream is read by LayerNorm keep it: a
    rotation does not keep the mean. Source: Ashkboos et al., QuaRot, arXiv 2404.00456.
    """

    name: ClassVar[str] = "rotate"
    requires: ClassVar[frozenset[Property]] = frozenset(
        {Property.CANONICAL, Property.SCHEMES, Property.FLOAT_MATMULS}
    )
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.STATISTICS, Property.CALIBRATED})
    exact: ClassVar[bool] = True
    sites: tuple[str, ...] = KINDS
    online: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for given, known, what in (
            (self.sites, KINDS, "kind of site"),
            (self.online, ONLINE_KINDS, "online rotation"),
        ):
            for kind in given:
                if kind not in known:
                    raise RecipeError(
                        f"rotate: unknown {what} {kind!r}",
                        did_you_mean(str(kind), known, "kinds"),
                    )

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        generator = ctx.generator()
        found, immovable = find_rotation_sites(gm, ctx.interface)
        for item in immovable:
            result.skip(item.node, item.reason)
        chosen = [site for site in found if self._wants(site, result)]
        plan = WeightPlan()
        drawn: dict[RotationSite, Rotation] = {}
        rows: list[tuple[object, ...]] = []
        for site in chosen:
            rotation = drawn[site] = random_rotation(site.block, generator)
            for turn in site.turns:
                plan.turn(turn, rotation)
            for norm in site.norms:
                plan.empty_norm(norm)
            rows.append(_row(label(site.source), site.kind, rotation, len(site.readers)))
        online = find_online_sites(gm, found, self.online, generator, result)
        for added in online:
            for linear in added.linears:
                plan.columns(linear, added.rotation.weights)
            rows.append(_row(label(added.x), added.kind, added.drawn, len(added.linears)))
        if not rows:
            return result
        result.sites = _regions(gm, drawn, [n for added in online for n in added.linears])
        result.tables["untied"] = _apply(plan, gm, ctx)
        for added in online:
            added.insert()
        result.changed = len(rows)
        columns = ("site", "kind", "size", "matrix", "flatness", "readers")
        result.tables["rotations"] = Table(columns, tuple(rows))
        return result

    def _wants(self, site: RotationSite, result: PassResult) -> bool:
        if site.kind not in self.sites:
            result.skip(site.source, f"sites of kind {site.kind} are not selected")
            return False
        if not any(map(is_quantized, site.readers)):
            result.skip(site.source, "no linear that reads it is quantized")
            return False
        return True


def _row(name: str, kind: str, rotation: Rotation, readers: int) -> tuple[object, ...]:
    return (name, kind, rotation.size, rotation.how, round(rotation.flatness, 3), readers)


def _apply(plan: WeightPlan, gm: fx.GraphModule, ctx: PassContext) -> Table:
    """Change the weights; a table of those that became two, and of the bytes that this costs."""
    before = _stored_bytes(gm)
    rows: list[tuple[object, ...]] = [
        (name, copy, get_tensor(gm, copy).nbytes) for name, copy in plan.apply(gm, ctx)
    ]
    grown = _stored_bytes(gm) - before
    if grown:
        rows.append(("all weights", "", grown))
    return Table(("weight", "copy", "bytes"), tuple(rows))


def _stored_bytes(gm: fx.GraphModule) -> int:
    """Bytes of all weights; what several names share counts once."""
    return sum({id(t): t.nbytes for t in weights_of(gm).values()}.values())


def _regions(
    gm: fx.GraphModule, rotations: dict[RotationSite, Rotation], edited: list[fx.Node]
) -> list[Region]:
    """The regions that read rotated values and whose own values are unchanged.

    A region ends where only the rotated stream leads on, so that rounding does not add up over the
    layers. What a router chose is given, since rounding may turn a choice between equal scores;
    the scores themselves are among the outputs.
    """
    streams = {n: q for s, q in rotations.items() if s.kind == "residual" for n in s.values}
    rotated = rotated_values(rotations)
    chosen = chosen_values(gm, rotated)
    given = [n for n in gm.graph.nodes if n in chosen and not chosen.issuperset(n.users)]
    ends = {n for n in cuts(gm) if n in streams and n.target in (EMBEDDING, ADD)}
    regions: list[Region] = []
    start: fx.Node | None = None
    outputs: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node in ends or node.op == "output":
            outputs += [node] if node in ends else []
            if outputs:
                stops = [] if start is None else [start]
                needed = ancestors(outputs, stop=[*stops, *given])
                inputs = [n for n in gm.graph.nodes if n in needed and n.op == "placeholder"]
                inputs += [n for n in given if n in needed]
                turned = {label(n): streams[n].apply for n in (*stops, node) if n in ends}
                read = tuple(map(label, [*inputs, *stops]))
                regions.append(Region(read, tuple(map(label, outputs)), turned))
            start, outputs = node, []
        elif (
            node.op == "call_function"
            and node not in rotated
            and isinstance(node.meta["val"], torch.Tensor)
            and (node in edited or not rotated.isdisjoint(node.all_input_nodes))
        ):
            outputs.append(node)
    return regions
