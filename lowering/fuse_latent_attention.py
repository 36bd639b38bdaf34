"""Find latent attention, and let one op choose at each call how it reads its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from panguq.ir.call_arguments import arguments, operand, operands_at
from panguq.ir.canonical_views import Attention
from panguq.ir.edit import call, label, replace
from panguq.ir.node_meta import annotate, meta_of
from panguq.ir.ops import latent_attention as latent_ops  # noqa: F401  (registers the op)
from panguq.ir.probe_sizes import PROBE_SIZES
from panguq.ir.properties import Property
from panguq.ir.run.equivalence import probe_value, probed_sizes, run_in_float64
from panguq.ir.views import Item, Linear
from panguq.passes.patterns.matching import is_call
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Region, Table

aten = torch.ops.aten
panguq = torch.ops.panguq


@dataclass(frozen=True)
class FuseLatentAttention(Pass):
    """Before: keys and values that a linear expands from a cache of latents, at every step anew.

        y = linear(c, W)                            c [batch, 1, past + seq, rank]
        attention(q, cat(y's keys, k broadcast over heads), y's values)

    After: `latent_attention(q_nope, q_rope, c, k, W, mask, scale)`, which multiplies as much in the
    expanded form and, where that is less, brings the queries to the latents instead
    (`ir/ops/latent_attention.py` has both formulas and the choice). A step of decoding then no
    longer expands the whole past.

    Found by data flow: y's parts are only moved on their way to the attention, nothing else reads
    them, and the way is run on random numbers to see that W's rows are, head after head, keys and
    values. The rotary part `k` has one head.

    Exactness: both forms are the same products of the same c and W, so this holds under every
    scheme. W stands for its codes, dequantized; c was quantized and dequantized if the scheme
    quantizes activations. The matmul itself becomes one in floating point.
    """

    name: ClassVar[str] = "fuse-latent-attention"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.CANONICAL})
    exact: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        rows: list[tuple[object, ...]] = []
        for node in [n for n in gm.graph.nodes if Attention.match(n) is not None]:
            found = _latents_of(gm, node, ctx.generator())
            if found is None:
                continue
            if isinstance(found, str):
                result.skip(node, found)
                continue
            result.sites.append(found.site(node))
            scheme = meta_of(found.linear.node).scheme
            rows.append((label(node), label(found.linear.node), scheme.name if scheme else "FLOAT"))
            replace(node, found.fused(node))
            result.changed += 1
        result.tables["latent_attention"] = Table(("attention", "expands", "scheme"), tuple(rows))
        return result


@dataclass(frozen=True)
class _Latents:
    """What an attention reads: its query in two parts, or whole, with the sizes of both."""

    query: tuple[fx.Node, ...]
    sizes: tuple[int, int]
    linear: Linear
    rope_key: fx.Node

    def fused(self, node: fx.Node) -> fx.Node:
        """The op in front of the attention."""
        given, query, latent = Attention.of(node), self.query, self.linear.input
        if len(query) == 1:
            nope, rope = self.sizes
            query = tuple(
                call(node, aten.slice.Tensor, (query[0], 3, *part), origin=query[0], suffix=suffix)
                for part, suffix in (((0, nope), ".nope"), ((nope, nope + rope), ".rope"))
            )
        if latent.meta["val"].dim() == 3:
            args = (latent, 1)
            latent = call(node, aten.unsqueeze.default, args, origin=latent, suffix=".one_head")
        args = (*query, latent, self.rope_key, self.linear.weight, given.mask, given.scale)
        fused = call(node, panguq.latent_attention.default, args, origin=node)
        expands = self.linear.node
        annotate(fused, scheme=meta_of(expands).scheme, merged=(label(expands),))
        return fused

    def site(self, node: fx.Node) -> Region:
        """What is proved: behind a cache, so that the op takes the form that is new."""
        mask = Attention.of(node).mask
        inputs = [*self.query, self.linear.input, self.rope_key]
        if mask is not None and mask.op != "get_attr":
            inputs.append(mask)
        names = dict.fromkeys(label(n) for n in inputs)
        return Region(tuple(names), (label(node),), sizes=PROBE_SIZES)


def _latents_of(
    gm: fx.GraphModule, node: fx.Node, generator: torch.Generator
) -> _Latents | str | None:
    """What the attention expands its keys and values from; why it cannot be fused; None for an
    attention of another kind."""
    given = Attention.of(node)
    parts, heads = _two_parts(given.key), given.key.meta["val"].shape[1]
    if parts is None or not isinstance(heads, int) or heads == 1:
        return None
    keys, rope_key = parts[0], _of_one_head(parts[1])
    if rope_key is None:
        return None
    if given.sinks is not None or given.softcap:
        return "its scores have sinks or a cap"
    linear = _linear_behind(keys)
    if linear is None:
        return f"{label(keys)} is not moved there from one linear"
    if linear.bias is not None:
        return f"{label(linear.node)} has a bias"
    if str(linear.input.meta["val"].shape[-2]) == str(given.query.meta["val"].shape[2]):
        return None  # nothing is cached, or what was expanded is
    reader = _other_reader(linear.node, node)
    if reader is not None:
        return f"{label(linear.node)} is also read by {label(reader)}"
    if given.query.meta["val"].shape[1] != heads or not _by_head(
        gm, linear, given, keys, generator
    ):
        return f"the rows of {label(linear.weight)} are not each head's keys and then its values"
    sizes = (int(keys.meta["val"].shape[3]), int(rope_key.meta["val"].shape[3]))
    query = _two_parts(given.query)
    if query is None or tuple(int(q.meta["val"].shape[3]) for q in query) != sizes:
        query = (given.query,)
    return _Latents(query, sizes, linear, rope_key)


def _two_parts(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The two that are joined along the last axis of `[batch, heads, seq, d]`."""
    if not is_call(node, aten.cat.default) or arguments(node)["dim"] not in (-1, 3):
        return None
    parts = tuple(operands_at(node, 0))
    return parts if len(parts) == 2 else None


def _of_one_head(node: fx.Node) -> fx.Node | None:
    """What was broadcast over all heads."""
    while is_call(node, aten.expand.default):
        node = operand(node, 0)
    shape = node.meta["val"].shape
    return node if len(shape) == 4 and isinstance(shape[1], int) and shape[1] == 1 else None


_MOVES = (
    aten.chunk.default, aten.expand.default, aten.permute.default, aten.reshape.default,
    aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.dim,
    aten.transpose.int, aten.unflatten.int, aten.unsqueeze.default,
)  # fmt: skip


def _moves(node: fx.Node) -> bool:
    return node.target in _MOVES or Item.match(node) is not None


def _linear_behind(node: fx.Node) -> Linear | None:
    while _moves(node):
        node = operand(node, 0)
    return Linear.match(node) if is_call(node, aten.linear.default) else None


def _other_reader(linear: fx.Node, attention: fx.Node) -> fx.Node | None:
    """Somebody who reads a part of the linear's result and is not this attention."""
    joined, stack = Attention.of(attention).key, list(linear.users)
    while stack:
        node = stack.pop()
        if _moves(node) or node is joined:
            stack.extend(node.users)
        elif node is not attention:
            return node
    return None


def _by_head(
    gm: fx.GraphModule, linear: Linear, given: Attention, keys: fx.Node, generator: torch.Generator
) -> bool:
    """Whether keys and values are, head after head, the two parts of the linear's rows."""
    if _linear_behind(given.value) != linear:
        return False
    made = probe_value(gm, linear.node, generator, PROBE_SIZES)
    inputs: dict[fx.Node, Any] = {**probed_sizes(gm, PROBE_SIZES), linear.node: made}
    found = run_in_float64(gm, inputs, [keys, given.value])
    heads, nope = (int(keys.meta["val"].shape[axis]) for axis in (1, 3))
    apart = made.reshape(*made.shape[:1], -1, heads, made.shape[-1] // heads).transpose(1, 2)
    return torch.equal(found[keys], apart[..., :nope]) and torch.equal(
        found[given.value], apart[..., nope:]
    )
