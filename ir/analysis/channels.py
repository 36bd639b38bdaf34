"""Where a positive scale per channel can move through the graph without changing its function.

A *source* divides its output by the scale through its own weights: a norm's weight (and bias),
the rows (and bias) of a linear, the columns of an embedding. From there the scale is followed
by data flow alone, one rule per op (`ir/analysis/channel_rules.py`), to every value that must
carry it, forward to readers and backward to whatever else must be divided alike (the other side of
a sum, the cached past). Linears absorb it: their weight's columns are multiplied. If anything
else meets the scale, nothing moves, and the reason names the node.

    x ─► norm / s ─► linear, columns · s                      norm_linear
    v_proj rows / s ─► attention ─► o_proj columns · s         value_output
    up_proj rows / s ─► silu(gate) · up ─► down_proj cols · s  up_down
    fc1 rows / s ─► relu ─► fc2 columns · s                    linear_linear
    embedding columns / s ─► linear, columns · s               embedding_linear
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.ir.analysis.channel_layout import UNSCALED, Layout
from panguq.ir.analysis.channel_rules import EMBEDDING, LINEAR, NORMS, RULES, stored_weight
from panguq.ir.analysis.walk import Blocked, GraphWalk, Stop, uncast
from panguq.ir.edit import label, operands
from panguq.ir.interface import Interface

KINDS = ("norm_linear", "value_output", "up_down", "linear_linear", "embedding_linear")


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """Multiply (or divide) a stored weight along `axis` by the scale of `channel[index]`.

    `channel` is as long as that axis; -1 leaves an index alone.
    """

    weight: str
    axis: int
    channel: Tensor
    multiply: bool


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear, of experts or not, that absorbs the scale: column j of its weight, the last axis,
    belongs to `channel[j]`."""

    linear: fx.Node
    weight: str
    channel: Tensor


@dataclass(frozen=True, eq=False)
class ScaleSite:
    """One scale of `channels` positive numbers that may be chosen freely.

    `source` is the first op that absorbs it, `values` all nodes whose value is divided by it,
    `edits` everything that has to change together.
    """

    kind: str
    name: str
    channels: int
    source: fx.Node
    values: tuple[fx.Node, ...]
    edits: tuple[WeightEdit, ...]
    consumers: tuple[Consumer, ...]


def find_scale_sites(
    gm: fx.GraphModule, interface: Interface
) -> tuple[list[ScaleSite], list[Blocked]]:
    """Every place where a scale can move, in graph order, and every source where it cannot.

    A linear whose output is split into parts (a fused q/k/v or gate/up) is tried part by part.
    """
    sites: list[ScaleSite] = []
    blocked: list[Blocked] = []
    done: set[fx.Node] = set()
    for source in _sources(gm):
        if source in done:
            continue
        if stored_weight(source) is None:
            blocked.append(Blocked(source, f"{label(source)} has no stored weight to scale"))
            continue
        attempts = _attempts(gm, interface, source)
        for found, reason in attempts:
            if found is None:
                blocked.append(Blocked(source, reason))
            else:
                sites.append(found)
                done.update(found.values)
    return sites, blocked


Attempt = tuple[ScaleSite | None, str]


def _attempts(gm: fx.GraphModule, interface: Interface, source: fx.Node) -> list[Attempt]:
    whole = ScaleWalk(gm, interface)
    attempt = whole.try_from(source)
    if attempt[0] is not None or not whole.parts:
        return [attempt]
    attempts: list[Attempt] = []
    moved = torch.empty(0, dtype=torch.long)
    for part in whole.parts:
        if torch.isin(part, moved).any():  # a part of a part that has moved as a whole
            continue
        attempts.append(ScaleWalk(gm, interface).try_from(source, part))
        if attempts[-1][0] is not None:
            moved = torch.cat([moved, part])
    return attempts


def _sources(gm: fx.GraphModule) -> list[fx.Node]:
    absorbing = (*NORMS, LINEAR, EMBEDDING)
    nodes = gm.graph.nodes
    found = [n for n in nodes if n.target in absorbing]
    return [n for n in found if n.target in NORMS or stored_weight(n) is not None]


class ScaleWalk(GraphWalk[Layout]):
    """All that has to carry one source's scale, grown until every rule is satisfied.

    The state of a value is the layout of the scale on it. Rules also call `absorb`, `consume` and
    `note_part`.
    """

    def __init__(self, gm: fx.GraphModule, interface: Interface) -> None:
        super().__init__(gm, interface)
        self.consumers: dict[fx.Node, tuple[str, Tensor]] = {}
        self.parts: list[Tensor] = []
        self.passed: set[str] = set()
        self._edits: dict[tuple[str, fx.Node], dict[tuple[int, bool], Tensor]] = defaultdict(dict)

    def try_from(self, source: fx.Node, part: Tensor | None = None) -> Attempt:
        """The site that starts at `source`, or the reason why there is none.

        `part` restricts the scale to these of the source's channels.
        """
        size = int(source.meta["val"].shape[-1])
        channels = torch.arange(size)
        name = label(source)
        if part is not None:
            outside = torch.ones(size, dtype=torch.bool)
            outside[part] = False
            channels = channels + outside * UNSCALED
            name += _spell_part(part)
        try:
            self.carry(source, Layout.last(channels, source.meta["val"].dim()))
            self.finish()
            if not self.consumers:
                raise Stop(f"no linear reads {label(source)}")
            return self._site(source, name), ""
        except Stop as reason:
            prefix = "" if part is None else name.removeprefix(label(source)) + ": "
            return None, f"{prefix}{reason}"

    # --- what rules call --------------------------------------------------------------------

    def carry(self, value: fx.Node, state: Layout | None) -> None:
        """Require that `value` is divided by the scale in this layout. Raises Stop."""
        if state is None:
            raise Stop(f"{label(value)} mixes the channels with other dims")
        known = self.states.get(value)
        if known is not None and not known.matches(state):
            raise Stop(f"{label(value)} would need two different scales")
        if known is None and not state.is_unscaled:
            self.put(value, state)

    def carry_operand(self, reader: fx.Node, operand: object, layout: Layout) -> None:
        """Require it of an operand of `reader`; a stored tensor takes it up itself."""
        if not isinstance(operand, fx.Node):
            self.stop(reader, "combines the channels with a constant")
        elif operand.op != "get_attr":
            self.carry(operand, layout)
        elif not layout.is_unscaled:
            axes = [d for d, step in enumerate(layout.steps) if step is not None]
            if len(axes) != 1:
                self.stop(reader, f"reads {operand.target} in a layout that is not one axis")
            channel = layout.along(axes[0], int(operand.meta["val"].shape[axes[0]]))
            assert channel is not None
            self.absorb(reader, operand, axes[0], channel, multiply=False)

    def absorb(
        self, reader: fx.Node, weight: fx.Node, axis: int, channel: Tensor, multiply: bool
    ) -> None:
        """Let the stored `weight` that `reader` reads take up the scale."""
        self._edits[str(weight.target), reader][axis, multiply] = channel

    def consume(self, linear: fx.Node, weight: fx.Node, channel: Tensor) -> None:
        """Let the linear's columns take up the scale."""
        self.consumers[linear] = str(weight.target), channel
        reader, _ = uncast(linear, linear.args[1])
        self.absorb(reader, weight, weight.meta["val"].dim() - 1, channel, multiply=True)

    def note_part(self, channels: Tensor) -> None:
        """Remember that the graph takes these channels apart from the others."""
        if not any(channels.equal(part) for part in self.parts):
            self.parts.append(channels)

    def visit_op(self, node: fx.Node) -> None:
        """Apply the rule of a called op. Raises Stop."""
        rule = RULES.get(node.target)
        passes = rule.passes if rule else ()
        refuses = rule.refuses if rule else {}
        for position, operand in operands(node):
            if operand in self.states and position not in passes:
                default = "cannot let a scale through" if rule else "is not homogeneous"
                self.refuse(operand, node, refuses.get(position, default))
        if rule is None:
            self.stop(node, "cannot absorb a scale")
        self.passed.add(rule.through)
        rule.apply(self, node)

    # --- the result -------------------------------------------------------------------------

    def _site(self, source: fx.Node, name: str) -> ScaleSite:
        edits = self._agreed_edits()
        used = torch.cat([edit.channel for edit in edits]).unique()
        used = used[used >= 0]

        def compact(channel: Tensor) -> Tensor:
            return torch.where(channel < 0, -1, torch.searchsorted(used, channel.clamp_min(0)))

        return ScaleSite(
            kind=self._kind(source),
            name=name,
            channels=len(used),
            source=source,
            values=tuple(n for n in self.gm.graph.nodes if n in self.states),
            edits=tuple(
                WeightEdit(e.weight, e.axis, compact(e.channel), e.multiply) for e in edits
            ),
            consumers=tuple(
                Consumer(linear, self.consumers[linear][0], compact(self.consumers[linear][1]))
                for linear in self.gm.graph.nodes
                if linear in self.consumers
            ),
        )

    def _agreed_edits(self) -> list[WeightEdit]:
        """One list of edits per weight, on which all of its readers must agree."""
        agreed: list[WeightEdit] = []
        for weight in dict.fromkeys(name for name, _ in self._edits):
            readers = _readers(self.gm, weight)
            first = next(self._edits[weight, r] for r in readers if (weight, r) in self._edits)
            for reader in readers:
                role = self._edits.get((weight, reader), {})
                same = role.keys() == first.keys() and all(role[k].equal(first[k]) for k in first)
                if not same or readers.count(reader) > 1:
                    how = "in another role" if role else "too"
                    raise Stop(f"weight {weight} is read by {label(reader)} {how}")
            agreed += [WeightEdit(weight, axis, c, mul) for (axis, mul), c in first.items()]
        return agreed

    def _kind(self, source: fx.Node) -> str:
        if source.target in NORMS:
            return "norm_linear"
        if source.target is EMBEDDING:
            return "embedding_linear"
        if "attention" in self.passed:
            return "value_output"
        return "up_down" if "product" in self.passed else "linear_linear"


def _readers(gm: fx.GraphModule, weight: str) -> list[fx.Node]:
    """Who reads this weight, through whichever node; twice where it is two arguments."""
    return [
        user
        for node in gm.graph.nodes
        if node.op == "get_attr" and node.target == weight
        for user in node.users
        for _, operand in operands(user)
        if operand is node
    ]


def _spell_part(part: Tensor) -> str:
    first, last = int(part[0]), int(part[-1])
    return f"[{first}:{last + 1}]" if last - first + 1 == len(part) else f"[{first}…{last}]"
