"""What the ops that canonicalize raises read, by name; see views.py and canonical_ops.py."""

from __future__ import annotations

from typing import Any

from torch import fx

from panguq.ir.call_arguments import argument, arguments, operand, optional_operand
from panguq.ir.views import View


class RmsNorm(View):
    """`rms_norm(x, weight, eps, offset, rounds_once)`."""

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

    @property
    def offset(self) -> float:
        """Added to the weight."""
        return float(arguments(self.node)["offset"])

    @property
    def rounds_once(self) -> bool:
        """Whether the norm is rounded after the weight alone, and not before it."""
        return bool(arguments(self.node)["rounds_once"])


class LayerNorm(View):
    """`panguq.layer_norm(x, weight, bias, eps, offset)`."""

    op = "panguq::layer_norm"

    @property
    def x(self) -> fx.Node:
        """What is normalized, `[..., k]`."""
        return operand(self.node, 0)

    @property
    def weight(self) -> fx.Node:
        """`[k]`."""
        return operand(self.node, 1)

    @property
    def bias(self) -> fx.Node | None:
        """`[k]`, if there is one."""
        return optional_operand(self.node, 2)

    @property
    def eps(self) -> float:
        """Added to the variance."""
        return float(argument(self.node, 3))

    @property
    def offset(self) -> float:
        """Added to the weight."""
        return float(argument(self.node, 4))


class Rotary(View):
    """`rotary(x, cos, sin, interleaved)`."""

    op = "panguq::rotary"

    @property
    def x(self) -> fx.Node:
        """`[batch, heads, seq, d]`."""
        return operand(self.node, 0)

    @property
    def tables(self) -> tuple[fx.Node, fx.Node]:
        """Cosines and sines, `[batch, seq, d]`."""
        return operand(self.node, 1), operand(self.node, 2)

    @property
    def interleaved(self) -> bool:
        """Whether neighbours are turned, and not halves."""
        return bool(arguments(self.node)["interleaved"])


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


class GeGlu(SwiGlu):
    """`geglu(gate, up, approximate)`: the gate goes through gelu."""

    op = "panguq::geglu"

    @property
    def approximate(self) -> str:
        """ "none" or "tanh"."""
        return str(argument(self.node, 2))


def gated_activation(node: fx.Node) -> SwiGlu:
    """The view of a gated activation of either kind. Raises TypeError for anything else."""
    return GeGlu.match(node) or SwiGlu.of(node)


def weight_offsets(gm: fx.GraphModule) -> dict[str, float]:
    """What norms add to their stored weights, by the weight's name; no entry for nothing."""
    offsets: dict[str, float] = {}
    for node in gm.graph.nodes:
        norm = RmsNorm.match(node) or LayerNorm.match(node)
        if norm is not None and norm.offset and norm.weight.op == "get_attr":
            offsets[str(norm.weight.target)] = norm.offset
    return offsets


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


class LatentAttention(View):
    """`latent_attention(query_nope, query_rope, latent, rope_key, weight, mask, scale)`."""

    op = "panguq::latent_attention"

    @property
    def queries(self) -> tuple[fx.Node, fx.Node]:
        """`[batch, heads, seq, nope]` and `[batch, heads, seq, rope]`."""
        return operand(self.node, 0), operand(self.node, 1)

    @property
    def latent(self) -> fx.Node:
        """`[batch, 1, total, rank]`, of all tokens."""
        return operand(self.node, 2)

    @property
    def rope_key(self) -> fx.Node:
        """`[batch, 1, total, rope]`."""
        return operand(self.node, 3)

    @property
    def weight(self) -> fx.Node:
        """`[heads * (nope + v), rank]`: stored, or computed from codes."""
        return operand(self.node, 4)

    @property
    def mask(self) -> fx.Node | None:
        """As attention's."""
        return optional_operand(self.node, 5)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(argument(self.node, 6))


class NpuLatentAttention(LatentAttention):
    """The same on an NPU, with a mask that is True where a key is hidden."""

    op = "panguq_npu::latent_attention"


class Kronecker(View):
    """`kronecker(x, left, right)`: x times the Kronecker product of two stored matrices."""

    op = "panguq::kronecker"

    @property
    def x(self) -> fx.Node:
        """`[..., a * b]`."""
        return operand(self.node, 0)

    @property
    def left(self) -> fx.Node:
        """`[a, a]`."""
        return operand(self.node, 1)

    @property
    def right(self) -> fx.Node:
        """`[b, b]`."""
        return operand(self.node, 2)
