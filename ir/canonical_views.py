"""What the ops that canonicalize raises read, by name; see views.py and canonical_ops.py."""

from __future__ import annotations

from typing import Any

from torch import fx

from panguq.ir.views import View, argument, arguments, operand


class RmsNorm(View):
    """`rms_norm(x, weight, eps)`."""

    op = "panguq::rms_norm"

    @property
    def x(self) -> fx.Node:
        """What is normalized, `[..., k]`."""
        return operand(self.node, 0)

    @property
    def weight(self) -> fx.Node:
        """`[k]`."""
        return operand(self.node, 1)

    @property
    def eps(self) -> float:
        """Added to the mean square."""
        return float(argument(self.node, 2))


class Rotary(View):
    """`rotary(x, cos, sin)`."""

    op = "panguq::rotary"

    @property
    def x(self) -> fx.Node:
        """`[batch, heads, seq, d]`."""
        return operand(self.node, 0)

    @property
    def tables(self) -> tuple[fx.Node, fx.Node]:
        """Cosines and sines, `[batch, seq, d]`."""
        return operand(self.node, 1), operand(self.node, 2)


class SwiGlu(View):
    """`swiglu(gate, up)`."""

    op = "panguq::swiglu"

    @property
    def gate(self) -> fx.Node:
        """What goes through silu."""
        return operand(self.node, 0)

    @property
    def up(self) -> fx.Node:
        """What it is multiplied with."""
        return operand(self.node, 1)


class Attention(View):
    """`attention(query, key, value, mask, scale, sinks, softcap)`."""

    op = "panguq::attention"

    @property
    def query(self) -> fx.Node:
        """`[batch, heads, seq, d]`."""
        return operand(self.node, 0)

    @property
    def key(self) -> fx.Node:
        """`[batch, kv_heads, total, d]`."""
        return operand(self.node, 1)

    @property
    def value(self) -> fx.Node:
        """As the key."""
        return operand(self.node, 2)

    @property
    def mask(self) -> fx.Node | None:
        """Broadcast to `[batch, heads, seq, total]`; without elements: plain causal. None hides
        nothing."""
        return arguments(self.node)["mask"]

    @property
    def scale(self) -> Any:
        """Of the scores."""
        return argument(self.node, 4)

    @property
    def sinks(self) -> fx.Node | None:
        """`[heads]`, the scores of one more key without a value."""
        return arguments(self.node)["sinks"]

    @property
    def softcap(self) -> float:
        """What the scores stay below; 0 for no cap."""
        return float(arguments(self.node)["softcap"])
