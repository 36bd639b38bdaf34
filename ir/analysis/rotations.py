"""Where an orthogonal matrix Q can move through the graph without changing its function.

A value x `[..., n]` is *rotated* when every run of `block` numbers of its last dim is multiplied
by Q `[block, block]`. The op that produces such a value absorbs Q into its weights (the columns of
an embedding, the rows and bias of a linear); the op that reads it absorbs Q^T (a linear's columns).
In between the rotation is followed by data flow alone, one rule per op
(`ir/analysis/rotation_rules.py`), forward to readers and backward to whatever else must be rotated
alike. If anything else meets it, nothing moves, and the reason names the node.

    embedding Q ─► rms_norm ─► linear, columns Q          residual: the stream between all norms
    linear, Q^T rows ─► add ─┘                            (the norm's weight goes to its readers)
    v_proj, Q^T rows ─► attention ─► o_proj, columns Q    value: per head

In a mixture of experts the router and every expert read the norm's result, and every expert writes
to the stream: tokens are permuted and added up as a whole.

Source: Ashkboos et al., QuaRot, arXiv 2404.00456.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from panguq.ir.analysis.rotation_rules import ATTENTIONS, EMBEDDING, NORMS, RULES, Turned
from panguq.ir.analysis.walk import Blocked, GraphWalk, Stop
from panguq.ir.edit import label, operands
from panguq.ir.interface import Interface

RotationKind = Literal["residual", "value"]


@dataclass(frozen=True)
class Turn:
    """What `reader` needs of a stored weight: runs of `block` rotated along `axis`.

    Only the indices from `start` to `stop` of that axis are. If `norm` is given, the weight's
    columns are first multiplied by that norm's weight.
    """

    weight: str
    reader: fx.Node
    axis: int
    block: int
    start: int
    stop: int
    norm: fx.Node | None = None


@dataclass(frozen=True, eq=False)
class RotationSite:
    """One orthogonal matrix `[block, block]` that may be chosen freely.

    `source` is the first op whose value is rotated by it, `values` are all such nodes, `norms`
    those whose weight becomes 1, `readers` the linears whose columns take it up.
    """

    kind: RotationKind
    source: fx.Node
    block: int
    values: tuple[fx.Node, ...]
    norms: tuple[fx.Node, ...]
    turns: tuple[Turn, ...]
    readers: tuple[fx.Node, ...]


def find_rotation_sites(
    gm: fx.GraphModule, interface: Interface
) -> tuple[list[RotationSite], list[Blocked]]:
    """Every place where a rotation can move, the streams first, and every one where it cannot.

    A stream is looked for from the input of each norm and from each embedding, a value from the
    result of each attention.
    """
    sites: list[RotationSite] = []
    blocked: list[Blocked] = []
    starts: list[tuple[RotationKind, fx.Node, fx.Node]] = [
        *(("residual", n, n.args[0]) for n in gm.graph.nodes if n.target in NORMS),
        *(("residual", n, n) for n in gm.graph.nodes if n.target is EMBEDDING),
        *(("value", n, n) for n in gm.graph.nodes if n.target in ATTENTIONS),
    ]
    taken: set[fx.Node] = set()
    failed: set[fx.Node] = set()
    for kind, named, value in starts:
        if value in taken or (kind == "residual" and value in failed):
            continue  # part of a site, or of a stream whose obstacle is known
        walk = RotationWalk(gm, interface)
        site, reason = walk.try_from(kind, value)
        if site is not None and taken.isdisjoint(site.values):
            sites.append(site)
            taken.update(site.values)
        else:
            reason = reason or f"{label(value)} would be rotated by two sites"
            blocked.append(Blocked(named, reason))
            failed.update(walk.states)
    return sites, blocked


class RotationWalk(GraphWalk[Turned]):
    """All that has to be rotated with one value, grown until every rule is satisfied.

    The state of a value is how it is rotated. Rules also call `absorb`, and add to `readers` the
    linears whose columns take the rotation up.
    """

    def __init__(self, gm: fx.GraphModule, interface: Interface) -> None:
        super().__init__(gm, interface)
        self.turns: dict[tuple[str, fx.Node, int], Turn] = {}
        self.readers: dict[fx.Node, None] = {}

    def try_from(self, kind: RotationKind, value: fx.Node) -> tuple[RotationSite | None, str]:
        """The site that `value` belongs to, or the reason why there is none."""
        block = int(value.meta["val"].shape[-1])
        try:
            self.carry(value, Turned(block, 0, block))
            self.finish()
            if not self.readers:
                raise Stop(f"no linear reads {label(value)}")
        except Stop as reason:
            return None, str(reason)
        values = tuple(n for n in self.gm.graph.nodes if n in self.states)
        norms = tuple(n for n in values if n.target in NORMS)
        source = next(n for n in values if n.op == "call_function")
        turns, readers = tuple(self.turns.values()), tuple(self.readers)
        return RotationSite(kind, source, block, values, norms, turns, readers), ""

    # --- what rules call --------------------------------------------------------------------

    def carry(self, value: fx.Node, state: Turned) -> None:
        """Require that `value` is rotated in this way. Raises Stop."""
        known = self.states.get(value)
        if known == state:
            return
        if known is not None:
            if replace(known, norm=None) == replace(state, norm=None):
                norm = known.norm or state.norm
                assert norm is not None
                by = "is read by what cannot take up the weight of"
                raise Stop(f"{label(value)} {by} {label(norm)}")
            raise Stop(f"{label(value)} would need two different rotations")
        self.put(value, state)

    def carry_operand(self, reader: fx.Node, operand: object, state: Turned) -> None:
        """Require it of an operand of `reader`; a stored tensor takes it up itself."""
        if not isinstance(operand, fx.Node):
            self.stop(reader, "combines the channels with a constant")
        if operand.op == "get_attr":
            self.absorb(reader, operand, operand.meta["val"].dim() - 1, state)
        else:
            self.carry(operand, state)

    def absorb(self, reader: fx.Node, weight: fx.Node, axis: int, state: Turned) -> None:
        """Let the stored `weight` that `reader` reads take up the rotation along `axis`."""
        name = str(weight.target)
        if sum(operand is weight for _, operand in operands(reader)) > 1:
            self.stop(reader, f"reads weight {name} twice")
        turn = Turn(name, reader, axis, state.block, state.start, state.stop, state.norm)
        self.turns[name, reader, axis] = turn

    def visit_op(self, node: fx.Node) -> None:
        """Apply the rule of a called op. Raises Stop."""
        rule = RULES.get(node.target)
        for position, operand in operands(node):
            if operand in self.states and (rule is None or position not in rule.passes):
                self.refuse(operand, node, rule.refuses if rule else "mixes its channels")
        if rule is None:
            self.stop(node, "cannot take up a rotation")
        rule.apply(self, node)


def rotated_values(sites: Iterable[RotationSite]) -> set[fx.Node]:
    """All nodes whose value some site rotates."""
    return {node for site in sites for node in site.values}
