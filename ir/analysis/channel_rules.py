"""One rule per op: how a scale per channel gets from an op's operands to its result and back.

The walk asks a rule when the op's result carries the scale, or an operand that the rule lets pass.
The rule then tells the walk what the op's other values have to carry. Operands that a rule does not
list in `passes` refuse the scale, and so do ops without a rule. (One table, hence one long file.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from panguq.ir.analysis.channel_layout import Layout, Size
from panguq.ir.analysis.walk import first_arguments, uncast
from panguq.ir.edit import label
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.ir.ops import experts as expert_ops  # noqa: F401

if TYPE_CHECKING:
    from panguq.ir.analysis.channels import ScaleWalk

aten = torch.ops.aten
panguq = torch.ops.panguq

LINEAR = aten.linear.default
EMBEDDING = aten.embedding.default
NORMS: dict[Any, int] = {
    panguq.rms_norm.default: 1,
    panguq.layer_norm.default: 1,
    aten.layer_norm.default: 2,
}  # the weight's position


@dataclass(frozen=True)
class ScaleRule:
    """What an op does to a scale.

    `passes` are the positions of operands that may carry it, `refuses` says why others may
    not, `through` names what kind of path a site takes that comes through here.
    """

    apply: Callable[[ScaleWalk, fx.Node], None]
    passes: tuple[int, ...] = ()
    refuses: dict[int | str, str] = field(default_factory=dict)
    through: str = ""


def val_shape(node: fx.Node) -> Sequence[Size]:
    """The shape of a node's value, dynamic sizes as SymInt."""
    return [s if isinstance(s, torch.SymInt) else int(s) for s in node.meta["val"].shape]


def stored_weight(source: fx.Node) -> fx.Node | None:
    """The stored weight of a linear `[n, k]`, a norm `[k]` or an embedding `[v, k]`, if any."""
    positions: dict[Any, int] = {LINEAR: 1, EMBEDDING: 0, **NORMS}
    position = positions[source.target]
    weight = source.args[position] if len(source.args) > position else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return weight if len(val_shape(weight)) == (1 if source.target in NORMS else 2) else None


def _tie(
    walk: ScaleWalk,
    node: fx.Node,
    operand: Any,
    forward: Callable[[Layout], Layout | None],
    backward: Callable[[Layout], Layout | None],
) -> None:
    """The result and one operand carry the scale together."""
    if (layout := walk.state(operand)) is not None:
        walk.carry(node, forward(layout))
    elif (layout := walk.state(node)) is not None:
        back = backward(layout)
        again = None if back is None else forward(back)
        if back is None or again is None or not again.matches(layout):
            walk.stop(node, "mixes the channels with other dims")
        walk.carry_operand(node, operand, back)


def _same(walk: ScaleWalk, node: fx.Node) -> None:
    if not node.meta["val"].is_floating_point():
        walk.stop(node, "makes integers of the channels")
    _tie(walk, node, node.args[0], lambda x: x, lambda x: x)


# --- ops that absorb --------------------------------------------------------------------------


def _last_axis(walk: ScaleWalk, value: fx.Node, node: fx.Node) -> Tensor:
    channel = walk.states[value].along(-1, int(val_shape(value)[-1]))
    if channel is None:
        walk.stop(node, "meets the channels in more than the last dim")
    return channel


def _linear(walk: ScaleWalk, node: fx.Node) -> None:
    x, weight = first_arguments(node, 2)
    _, weight = uncast(node, weight)
    if walk.state(x) is not None:
        if weight.op != "get_attr":
            walk.stop(node, "has a weight that is not stored")
        walk.consume(node, weight, _last_axis(walk, x, node))
    if walk.state(node) is not None:
        _absorb_result(walk, node, axis=0, bias=2)


def _expert_linear(walk: ScaleWalk, node: fx.Node) -> None:
    """The columns of all experts' weights take up the scale of what they read."""
    x, weight = first_arguments(node, 2)
    if walk.state(node) is not None:
        walk.stop(node, "is computed by several experts")
    if weight.op != "get_attr":
        walk.stop(node, "has a weight that is not stored")
    walk.consume(node, weight, _last_axis(walk, x, node))


def _norm(walk: ScaleWalk, node: fx.Node) -> None:
    _absorb_result(walk, node, axis=0, bias=NORMS[node.target] + 1)


def _embedding(walk: ScaleWalk, node: fx.Node) -> None:
    _absorb_result(walk, node, axis=1, bias=None)


def _absorb_result(walk: ScaleWalk, node: fx.Node, axis: int, bias: int | None) -> None:
    """The result is divided by dividing the weight along `axis`, and the bias."""
    channel = _last_axis(walk, node, node)
    weight = stored_weight(node)
    if weight is None:
        walk.stop(node, "has no stored weight that could absorb a scale")
    walk.absorb(node, weight, axis, channel, multiply=False)
    added = node.args[bias] if bias is not None and len(node.args) > bias else None
    if not isinstance(added, fx.Node):
        return
    if added.op != "get_attr":
        walk.stop(node, "has a bias that is not stored")
    walk.absorb(node, added, 0, channel, multiply=False)


# --- elementwise ops --------------------------------------------------------------------------


def _restricted(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """The layout of an operand of this shape that broadcasts to a value in `layout`."""
    extra = layout.rank - len(shape)
    own = layout.steps[extra:]
    lost = [
        *layout.steps[:extra],
        *(s for s, n in zip(own, shape, strict=True) if isinstance(n, int) and n == 1),
    ]
    return None if any(s is not None for s in lost) else Layout(layout.base, own)


def _sum(walk: ScaleWalk, node: fx.Node) -> None:
    """Both sides of a sum carry the same scale as the sum."""
    rank = len(val_shape(node))
    for operand in node.args[:2]:
        if (layout := walk.state(operand)) is not None:
            walk.carry(node, layout.padded(rank))
    layout = walk.state(node)
    if layout is None:
        return
    for operand in node.args[:2]:
        if not isinstance(operand, fx.Node):
            walk.stop(node, "adds a constant")
        own = _restricted(layout, val_shape(operand))
        if own is None:
            walk.stop(node, f"spreads {label(operand)} over the channels")
        walk.carry_operand(node, operand, own)


def _product(walk: ScaleWalk, node: fx.Node) -> None:
    """One factor carries the scale."""
    factors = [f for f in node.args[:2] if isinstance(f, fx.Node)]
    scaled = [f for f in factors if walk.state(f) is not None]
    if len(scaled) > 1:
        walk.stop(node, "multiplies the scale with itself")
    if len(scaled) == 1:
        walk.carry(node, walk.states[scaled[0]].padded(len(val_shape(node))))
    elif len(factors) == 1:
        _tie(walk, node, factors[0], lambda x: x, lambda x: x)
    else:
        walk.stop(node, "does not say which of its factors would carry the scale")
    if len(factors) == 2 and all(f.op != "get_attr" for f in factors):
        walk.passed.add("product")


def _gated(walk: ScaleWalk, node: fx.Node) -> None:
    _tie(walk, node, node.args[1], lambda x: x, lambda x: x)


# --- matmuls of activations ---------------------------------------------------------------------


def _attention(walk: ScaleWalk, node: fx.Node) -> None:
    """Value `[batch, kv_heads, total, d]` to `[batch, heads, seq, d]`, heads in groups."""
    query, _, value = first_arguments(node, 3)
    if len(val_shape(value)) != 4:
        walk.stop(node, "is not over [batch, heads, tokens, d]")
    kv_heads = int(val_shape(value)[1])
    groups = int(val_shape(query)[1]) // kv_heads

    def forward(layout: Layout) -> Layout | None:
        if layout.steps[2] is not None:
            return None
        return layout.taken(1, torch.arange(kv_heads).repeat_interleave(groups))

    _tie(walk, node, value, forward, lambda x: x.taken(1, slice(None, None, groups)))


def _matmul(walk: ScaleWalk, node: fx.Node) -> None:
    """`[…, m, k] @ […, k, n]`: the scale passes along m or n (and batch dims), never along k."""
    rank = len(val_shape(node))
    factors = first_arguments(node, 2)
    left, right = (walk.state(factor) for factor in factors)
    if left is not None and right is not None:
        walk.stop(node, "multiplies the scale with itself")
    layout, summed = (left, -1) if left is not None else (right, -2)
    if layout is None:
        walk.stop(node, "does not say which of its factors would carry the scale")
    if any(len(val_shape(f)) < 2 for f in factors) or layout.steps[summed] is not None:
        walk.stop(node, "sums over the channels")
    walk.carry(node, layout.padded(rank))


# --- ops that move elements ---------------------------------------------------------------------


def _reshape(walk: ScaleWalk, node: fx.Node) -> None:
    x = first_arguments(node, 1)[0]
    old, new = val_shape(x), val_shape(node)
    _tie(walk, node, x, lambda x: x.reshaped(old, new), lambda x: x.reshaped(new, old))


def _transpose(walk: ScaleWalk, node: fx.Node) -> None:
    dims = list(range(len(val_shape(node))))
    x, first, second = node.args if len(node.args) == 3 else (node.args[0], 0, -1)
    assert isinstance(first, int) and isinstance(second, int)
    dims[first], dims[second] = dims[second], dims[first]
    _tie(walk, node, x, lambda y: y.permuted(dims), lambda y: y.permuted(dims))


def _permute(walk: ScaleWalk, node: fx.Node) -> None:
    (x, order), rank = first_arguments(node, 2), len(val_shape(node))
    dims = [d % rank for d in order]
    back = [dims.index(d) for d in range(rank)]
    _tie(walk, node, x, lambda y: y.permuted(dims), lambda y: y.permuted(back))


def _expand(walk: ScaleWalk, node: fx.Node) -> None:
    """Also a quotient, whose divisor may broadcast the numerator."""
    x = first_arguments(node, 1)[0]
    rank, shape = len(val_shape(node)), val_shape(x)
    _tie(walk, node, x, lambda y: y.padded(rank), lambda y: _restricted(y, shape))


def _repeat_interleave(walk: ScaleWalk, node: fx.Node) -> None:
    x, repeats, dim = first_arguments(node, 3)
    if not isinstance(repeats, int) or not isinstance(dim, int):
        walk.stop(node, "repeats by a dynamic number")
    dim %= len(val_shape(node))

    def forward(layout: Layout) -> Layout:
        step = layout.steps[dim]
        index = slice(None) if step is None else torch.arange(len(step)).repeat_interleave(repeats)
        return layout.taken(dim, index)

    _tie(walk, node, x, forward, lambda y: y.taken(dim, slice(None, None, repeats)))


def _cat(walk: ScaleWalk, node: fx.Node) -> None:
    tensors, dim = first_arguments(node, 2)
    dim = dim or 0
    layouts = [*(walk.state(t) for t in tensors), walk.state(node)]
    layout = next(x for x in layouts if x is not None)
    if layout.steps[dim] is not None:
        walk.stop(node, "puts the channels beside others")
    for tensor in tensors:
        walk.carry_operand(node, tensor, layout)
    walk.carry(node, layout)


def _index(walk: ScaleWalk, node: fx.Node) -> None:
    """`x[:, positions]`: positions of a dim that is no channel dim."""
    x, indices = first_arguments(node, 2)
    dims = [d for d, index in enumerate(indices) if index is not None]
    layout = walk.state(x) or walk.state(node)
    plain = len(dims) == 1 and len(val_shape(indices[dims[0]])) == 1
    if not plain or layout is None or layout.steps[dims[0]] is not None:
        walk.stop(node, "picks elements across the channels")
    _same(walk, node)


# --- parts of a tensor --------------------------------------------------------------------------


def _part(
    walk: ScaleWalk, node: fx.Node, whole: fx.Node, dim: int, taken: slice, drop: bool = False
) -> None:
    """The result is `whole` with some indices of one dim, which is dropped after a select."""
    layout = walk.state(whole)
    if layout is None:
        if drop or walk.states[node].steps[dim] is not None:
            walk.stop(node, "is only a part of the channels")
        walk.carry(whole, walk.states[node])
        return
    dim %= layout.rank
    part = layout.taken(dim, taken)
    if layout.steps[dim] is not None and not part.is_unscaled:
        walk.note_part(part.channels())
    walk.carry(node, part.without(dim) if drop else part)


def _slice(walk: ScaleWalk, node: fx.Node) -> None:
    x, dim, start, end, step = first_arguments(node, 5)
    if not all(bound is None or isinstance(bound, int) for bound in (start, end, step)):
        layout = walk.state(x) or walk.states[node]
        if layout.steps[dim or 0] is not None:
            walk.stop(node, "takes a dynamic part of the channels")
        start = end = step = None
    _part(walk, node, x, dim or 0, slice(start, end, step))


def _select(walk: ScaleWalk, node: fx.Node) -> None:
    x, dim, index = first_arguments(node, 3)
    if not isinstance(index, int):
        walk.stop(node, "picks a dynamic index")
    _part(walk, node, x, dim, slice(index, index + 1 or None), drop=True)


def _split(walk: ScaleWalk, node: fx.Node) -> None:
    """split, split_with_sizes, chunk: the list of parts carries the whole's layout."""
    walk.carry(node, walk.states[first_arguments(node, 1)[0]])


def _getitem(walk: ScaleWalk, node: fx.Node) -> None:
    split, index = first_arguments(node, 2)
    if walk.state(split) is None:
        walk.stop(node, "is only a part of the channels")
    dim = first_arguments(split, 3)[2] or 0
    before = [part.shape[dim] for part in split.meta["val"][: index + 1]]
    if walk.states[split].steps[dim] is None:
        walk.carry(node, walk.states[split])
        return
    end = sum(int(size) for size in before)
    _part(walk, node, split, dim, slice(end - int(before[-1]), end))


_KEEPS = ScaleRule(_same, passes=(0,))
_MOVES = ScaleRule(_reshape, passes=(0,))
_SPREADS = ScaleRule(_expand, passes=(0,))
_ADDS = ScaleRule(_sum, passes=(0, 1))
_SPLITS = ScaleRule(_split, passes=(0,))
_NORM = ScaleRule(_norm, refuses={0: "normalizes over the channels"})


def _gate(activation: str) -> ScaleRule:
    refuses: dict[int | str, str] = {0: f"applies {activation}, which is not homogeneous"}
    return ScaleRule(_gated, passes=(1,), refuses=refuses, through="product")


_SCORES = "would change the attention scores"
_ATTENTION = ScaleRule(
    _attention, passes=(2,), refuses={0: _SCORES, 1: _SCORES}, through="attention"
)

RULES: dict[Any, ScaleRule] = {
    panguq.rms_norm.default: _NORM,
    panguq.layer_norm.default: _NORM,
    aten.layer_norm.default: _NORM,
    LINEAR: ScaleRule(_linear, passes=(0,)),
    EMBEDDING: ScaleRule(_embedding),
    panguq.expert_linear.default: ScaleRule(_expert_linear, passes=(0,)),
    panguq.permute_tokens.default: _KEEPS,
    panguq.swiglu.default: _gate("silu"),
    panguq.geglu.default: _gate("gelu"),
    panguq.attention.default: _ATTENTION,
    aten.scaled_dot_product_attention.default: _ATTENTION,
    panguq.rotary.default: ScaleRule(_same, refuses={0: "mixes the channels of a head"}),
    aten.matmul.default: ScaleRule(_matmul, passes=(0, 1), through="attention"),
    aten.bmm.default: ScaleRule(_matmul, passes=(0, 1), through="attention"),
    aten.relu.default: _KEEPS,
    aten.leaky_relu.default: _KEEPS,
    aten.neg.default: _KEEPS,
    aten.abs.default: _KEEPS,
    aten.clone.default: _KEEPS,
    aten.contiguous.default: _KEEPS,
    aten.to.dtype: _KEEPS,
    aten.to.dtype_layout: _KEEPS,
    aten.to.device: _KEEPS,
    aten._to_copy.default: _KEEPS,
    aten.type_as.default: _KEEPS,
    aten.add.Tensor: _ADDS,
    aten.sub.Tensor: _ADDS,
    aten.mul.Tensor: ScaleRule(_product, passes=(0, 1)),
    aten.div.Tensor: ScaleRule(_expand, passes=(0,), refuses={1: "divides by it"}),
    aten.reshape.default: _MOVES,
    aten.view.default: _MOVES,
    aten.view_as.default: _MOVES,
    aten._unsafe_view.default: _MOVES,
    aten.flatten.using_ints: _MOVES,
    aten.unflatten.int: _MOVES,
    aten.unsqueeze.default: _MOVES,
    aten.squeeze.default: _MOVES,
    aten.squeeze.dim: _MOVES,
    aten.squeeze.dims: _MOVES,
    aten.transpose.int: ScaleRule(_transpose, passes=(0,)),
    aten.t.default: ScaleRule(_transpose, passes=(0,)),
    aten.permute.default: ScaleRule(_permute, passes=(0,)),
    aten.expand.default: _SPREADS,
    aten.expand_as.default: _SPREADS,
    aten.broadcast_to.default: _SPREADS,
    aten.repeat_interleave.self_int: ScaleRule(_repeat_interleave, passes=(0,)),
    aten.cat.default: ScaleRule(_cat, passes=(0,)),
    aten.index.Tensor: ScaleRule(_index, passes=(0,)),
    aten.slice.Tensor: ScaleRule(_slice, passes=(0,)),
    aten.select.int: ScaleRule(_select, passes=(0,)),
    aten.split.Tensor: _SPLITS,
    aten.split.sizes: _SPLITS,
    aten.split_with_sizes.default: _SPLITS,
    aten.chunk.default: _SPLITS,
    operator.getitem: ScaleRule(_getitem, passes=(0,)),
}
