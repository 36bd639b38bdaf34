"""One rule per op: how a rotation of the last dim gets from operands to the result and back.

The walk asks a rule when the op's result is rotated, or an operand that the rule lets pass. The
rule then tells the walk how the op's other values have to be rotated. Operands that a rule does
not list in `passes` refuse the rotation, and so do ops without a rule. (One table, hence one long
file.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from panguq.ir.analysis.walk import first_arguments, uncast
from panguq.ir.call_arguments import argument, arguments, operand
from panguq.ir.edit import label
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.ir.ops import experts as expert_ops  # noqa: F401
from panguq.ir.views import ExpertLinear, Item

if TYPE_CHECKING:
    from panguq.ir.analysis.rotations import RotationWalk

aten = torch.ops.aten
panguq = torch.ops.panguq

EMBEDDING = aten.embedding.default
NORMS = (panguq.rms_norm.default, panguq.layer_norm.default, aten.layer_norm.default)
ATTENTIONS = (panguq.attention.default, aten.scaled_dot_product_attention.default)


@dataclass(frozen=True)
class Turned:
    """Indices `start` to `stop` of a value's last dim are rotated, in runs of `block`.

    `norm` is the norm whose weight the value's readers still have to multiply by.
    """

    block: int
    start: int
    stop: int
    norm: fx.Node | None = None


@dataclass(frozen=True)
class RotationRule:
    """What an op does to a rotation; `passes` are the operands that may be rotated, `refuses`
    says why others may not."""

    apply: Callable[[RotationWalk, fx.Node], None]
    passes: tuple[int, ...] = (0,)
    refuses: str = "cannot let a rotation through there"


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _last(node: Any) -> int | None:
    """The size of the last dim; None for a scalar, -1 for a dynamic size."""
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return None
    return -1 if isinstance(value.shape[-1], torch.SymInt) else int(value.shape[-1])


def _stored(node: Any, rank: int) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and _rank(node) == rank


def _tie(walk: RotationWalk, node: fx.Node, operand: Any) -> None:
    """The result and one operand are rotated alike."""
    if (state := walk.state(operand)) is not None:
        walk.carry(node, state)
    elif (state := walk.state(node)) is not None:
        walk.carry_operand(node, operand, state)


def _same(walk: RotationWalk, node: fx.Node) -> None:
    if not node.meta["val"].is_floating_point():
        walk.stop(node, "makes integers of the channels")
    _tie(walk, node, operand(node, 0))


# --- ops that absorb --------------------------------------------------------------------------


def _linear(walk: RotationWalk, node: fx.Node) -> None:
    """Of experts, every one takes it up: their weights are `[experts, n, k]`."""
    x, weight, bias = first_arguments(node, 3)
    read, made = walk.state(x), walk.state(node)
    reader, weight = uncast(node, weight)
    stacked = int(ExpertLinear.match(node) is not None)
    if not _stored(weight, 2 + stacked):
        walk.stop(node, "has a weight that is not stored")
    if read is not None:
        walk.readers[node] = None
        walk.absorb(reader, weight, 1 + stacked, read)
    if made is None:
        return
    walk.absorb(reader, weight, stacked, made)
    if bias is not None and not _stored(bias, 1 + stacked):
        walk.stop(node, "has a bias that is not stored")
    if bias is not None:
        walk.absorb(node, bias, stacked, made)


def _embedding(walk: RotationWalk, node: fx.Node) -> None:
    state, weight = walk.state(node), operand(node, 0)
    if not _stored(weight, 2) or state is None:
        walk.stop(node, "has no stored weight that could absorb a rotation")
    walk.absorb(node, weight, 1, state)


def _rms_norm(walk: RotationWalk, node: fx.Node) -> None:
    """`norm(x Q) = norm(x) Q` without its weight, which the readers multiply their columns by."""
    x, weight = first_arguments(node, 2)
    size = _last(node)
    if not _stored(weight, 1) or size is None:
        walk.stop(node, "has a weight that is not stored")
    if any(s is not None and s.block != size for s in (walk.state(x), walk.state(node))):
        walk.stop(node, "normalizes over more than one rotated run")
    walk.carry(x, Turned(size, 0, size))
    walk.carry(node, Turned(size, 0, size, node))


def _layer_norm(walk: RotationWalk, node: fx.Node) -> None:
    walk.stop(node, "subtracts the mean over the channels, which a rotation does not keep")


# --- elementwise ops --------------------------------------------------------------------------


def _sum(walk: RotationWalk, node: fx.Node) -> None:
    """Both sides of a sum are rotated alike."""
    states = [walk.state(n) for n in (*node.args[:2], node)]
    state = next(s for s in states if s is not None)
    if state.norm is not None:
        walk.stop(node, f"reads {label(state.norm)} and cannot take up its weight")
    for term in node.args[:2]:
        if _last(term) != _last(node):
            name = label(term) if isinstance(term, fx.Node) else "a constant"
            walk.stop(node, f"adds {name} to every channel")
        walk.carry_operand(node, term, state)
    walk.carry(node, state)


def _product(walk: RotationWalk, node: fx.Node) -> None:
    """One factor is rotated, the other is one number for all of its channels."""
    first, second = node.args[:2]
    plain = [f for f in (first, second) if _last(f) in (None, 1) and walk.state(f) is None]
    if len(plain) != 1 or _last(node) == 1:
        walk.stop(node, "multiplies each channel by a number of its own")
    _tie(walk, node, second if plain[0] is first else first)


def _quotient(walk: RotationWalk, node: fx.Node) -> None:
    if _last(node.args[1]) not in (None, 1):
        walk.stop(node, "divides each channel by a number of its own")
    _tie(walk, node, operand(node, 0))


# --- matmuls of activations ---------------------------------------------------------------------


def _attention(walk: RotationWalk, node: fx.Node) -> None:
    """A weighted sum over tokens of value `[batch, kv_heads, total, d]`, head by head."""
    _tie(walk, node, operand(node, 2))


def _matmul(walk: RotationWalk, node: fx.Node) -> None:
    """`[..., m, k] @ [..., k, n]`: the right factor is rotated along n."""
    if _rank(operand(node, 1)) < 2:
        walk.stop(node, "sums over the channels")
    _tie(walk, node, operand(node, 1))


# --- ops that move elements ---------------------------------------------------------------------


def _reshape(walk: RotationWalk, node: fx.Node) -> None:
    """Runs stay runs if both last dims are multiples of their length."""
    x = operand(node, 0)
    for source, result in ((x, node), (node, x)):
        state = walk.state(source)
        if state is None:
            continue
        size = _last(result)
        if _last(source) != size:
            whole = state.start == 0 and state.stop == _last(source)
            if size is None or size % state.block or not whole or state.norm is not None:
                walk.stop(node, "mixes the channels with other dims")
            state = replace(state, stop=size)
        if result is x:
            walk.carry_operand(node, x, state)
        else:
            walk.carry(node, state)
        return


def _transpose(walk: RotationWalk, node: fx.Node) -> None:
    given = arguments(node)
    dims = [given.get(name, axis) % _rank(node) for axis, name in enumerate(("dim0", "dim1"))]
    if _rank(node) - 1 in dims:
        walk.stop(node, "moves the channels to another dim")
    _tie(walk, node, operand(node, 0))


def _permute(walk: RotationWalk, node: fx.Node) -> None:
    if int(argument(node, 1)[-1]) % _rank(node) != _rank(node) - 1:
        walk.stop(node, "moves the channels to another dim")
    _tie(walk, node, operand(node, 0))


def _spread(walk: RotationWalk, node: fx.Node) -> None:
    if _last(node) != _last(operand(node, 0)):
        walk.stop(node, "repeats the channels")
    _tie(walk, node, operand(node, 0))


def _repeat_interleave(walk: RotationWalk, node: fx.Node) -> None:
    dim = first_arguments(node, 3)[2]
    if dim is None or dim % _rank(node) == _rank(node) - 1:
        walk.stop(node, "repeats the channels")
    _tie(walk, node, operand(node, 0))


def _cat(walk: RotationWalk, node: fx.Node) -> None:
    tensors, dim = first_arguments(node, 2)
    if (dim or 0) % _rank(node) == _rank(node) - 1:
        walk.stop(node, "puts the channels beside others")
    state = next(s for s in (walk.state(n) for n in (*tensors, node)) if s is not None)
    for tensor in tensors:
        walk.carry_operand(node, tensor, state)
    walk.carry(node, state)


def _index(walk: RotationWalk, node: fx.Node) -> None:
    """`x[:, positions]`: positions of dims before the last, whose place they keep."""
    x, indices = operand(node, 0), argument(node, 1)
    picked = [d for d, index in enumerate(indices) if index is not None]
    if len(picked) != 1 or picked[0] >= _rank(x) - 1 or _rank(indices[picked[0]]) != 1:
        walk.stop(node, "picks elements across the channels")
    _tie(walk, node, x)


# --- parts of a tensor --------------------------------------------------------------------------


def _part(walk: RotationWalk, node: fx.Node, whole: fx.Node, low: int, high: int) -> None:
    """The result is `whole[..., low:high]`."""
    if (state := walk.state(node)) is not None:
        start, stop = state.start + low, state.stop + low
        walk.carry(whole, replace(state, start=start, stop=stop))
        return
    state = walk.state(whole)
    assert state is not None
    start, stop = max(state.start, low), min(state.stop, high)
    if start >= stop:
        return
    if (start - state.start) % state.block or (stop - state.start) % state.block:
        walk.stop(node, "takes a part of the rotated channels")
    if state.norm is not None:
        walk.stop(node, f"takes a part of the channels of {label(state.norm)}")
    walk.carry(node, replace(state, start=start - low, stop=stop - low))


def _slice(walk: RotationWalk, node: fx.Node) -> None:
    x, dim, start, end, step = first_arguments(node, 5)
    size = _last(x)
    if (dim or 0) % _rank(node) != _rank(node) - 1 or _last(node) == size:
        _tie(walk, node, x)
    elif step in (None, 1) and isinstance(start, int | None) and isinstance(end, int | None):
        assert size is not None
        _part(walk, node, x, *slice(start, end).indices(size)[:2])
    else:
        walk.stop(node, "takes a part of the rotated channels")


def _select(walk: RotationWalk, node: fx.Node) -> None:
    x, dim = first_arguments(node, 2)
    if dim % _rank(x) == _rank(x) - 1:
        walk.stop(node, "takes a part of the rotated channels")
    if walk.state(x) is None:
        walk.stop(node, "is only a part of a tensor")
    _tie(walk, node, x)


def _split(walk: RotationWalk, node: fx.Node) -> None:
    """The list of parts stands for the whole."""
    _tie(walk, node, operand(node, 0))


def _getitem(walk: RotationWalk, node: fx.Node) -> None:
    split, index = Item.of(node).source, Item.of(node).index
    dim = first_arguments(split, 3)[2] or 0
    if dim % _rank(node) != _rank(node) - 1:
        if walk.state(split) is None:
            walk.stop(node, "is only a part of a tensor")
        _tie(walk, node, split)
        return
    sizes = [int(part.shape[-1]) for part in split.meta["val"][: index + 1]]
    _part(walk, node, split, sum(sizes[:-1]), sum(sizes))


_KEEPS = RotationRule(_same)
_MOVES = RotationRule(_reshape)
_SPREADS = RotationRule(_spread)
_SPLITS = RotationRule(_split)
_ADDS = RotationRule(_sum, passes=(0, 1))
_TURNS = RotationRule(_transpose)
_ATTENDS = RotationRule(_attention, passes=(2,), refuses="would change its scores")
_MATMUL = RotationRule(_matmul, passes=(1,), refuses="sums over the channels")

RULES: dict[Any, RotationRule] = {
    panguq.rms_norm.default: RotationRule(_rms_norm),
    panguq.layer_norm.default: RotationRule(_layer_norm),
    aten.layer_norm.default: RotationRule(_layer_norm),
    aten.linear.default: RotationRule(_linear),
    EMBEDDING: RotationRule(_embedding, passes=()),
    panguq.permute_tokens.default: _KEEPS,
    panguq.expert_linear.default: RotationRule(_linear),
    panguq.combine_experts.default: _KEEPS,
    panguq.attention.default: _ATTENDS,
    aten.scaled_dot_product_attention.default: _ATTENDS,
    aten.matmul.default: _MATMUL,
    aten.bmm.default: _MATMUL,
    aten.neg.default: _KEEPS,
    aten.clone.default: _KEEPS,
    aten.contiguous.default: _KEEPS,
    aten.detach.default: _KEEPS,
    aten.alias.default: _KEEPS,
    aten.dropout.default: _KEEPS,
    aten.to.dtype: _KEEPS,
    aten.to.dtype_layout: _KEEPS,
    aten.to.device: _KEEPS,
    aten._to_copy.default: _KEEPS,
    aten.type_as.default: _KEEPS,
    aten.add.Tensor: _ADDS,
    aten.sub.Tensor: _ADDS,
    aten.mul.Tensor: RotationRule(_product, passes=(0, 1)),
    aten.div.Tensor: RotationRule(_quotient, refuses="divides by it"),
    aten.mul.Scalar: RotationRule(_quotient),
    aten.div.Scalar: RotationRule(_quotient),
    aten.reshape.default: _MOVES,
    aten.view.default: _MOVES,
    aten._unsafe_view.default: _MOVES,
    aten.flatten.using_ints: _MOVES,
    aten.unflatten.int: _MOVES,
    aten.unsqueeze.default: _MOVES,
    aten.squeeze.dim: _MOVES,
    aten.transpose.int: _TURNS,
    aten.t.default: _TURNS,
    aten.permute.default: RotationRule(_permute),
    aten.expand.default: _SPREADS,
    aten.expand_as.default: _SPREADS,
    aten.broadcast_to.default: _SPREADS,
    aten.repeat_interleave.self_int: RotationRule(_repeat_interleave),
    aten.cat.default: RotationRule(_cat),
    aten.index.Tensor: RotationRule(_index),
    aten.slice.Tensor: RotationRule(_slice),
    aten.select.int: RotationRule(_select),
    aten.split.Tensor: _SPLITS,
    aten.split.sizes: _SPLITS,
    aten.split_with_sizes.default: _SPLITS,
    aten.chunk.default: _SPLITS,
    operator.getitem: RotationRule(_getitem),
}
