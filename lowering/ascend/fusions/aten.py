"""panguq's canonical ops spelled in aten ops, for where no fused op of the vendor fits.

Each computes what the canonical op's body computes, in the same dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from panguq.ir.canonical_views import (
    Attention,
    GeGlu,
    Kronecker,
    LayerNorm,
    RmsNorm,
    Rotary,
    SwiGlu,
)
from panguq.ir.edit import call
from panguq.ir.ops import kronecker, quantize  # noqa: F401  (register the ops)
from panguq.lowering.ascend.fusions.cache import (
    spell_dequantize,
    spell_quantize_per_channel,
    spell_quantize_per_tensor,
    spell_quantize_per_token,
)
from panguq.lowering.ascend.fusions.latent_attention import spell_latent_attention
from panguq.lowering.ascend.fusions.masks import attended_mask
from panguq.lowering.ascend.fusions.shared import FusionState, size_key

aten = torch.ops.aten
panguq = torch.ops.panguq


def spell_rms_norm(node: fx.Node, state: FusionState) -> fx.Node:
    """`weight * (x * rsqrt(mean(x^2) + eps))`, the norm in float32, rounded before the weight.

    With `rounds_once` all is in float32, and rounded behind the weight.
    """
    given = RmsNorm.of(node)
    x, weight, eps = given.x, given.weight, given.eps
    dtype = x.meta["val"].dtype
    narrow = dtype not in (torch.float32, torch.float64)
    wide = _step(node, aten.to.dtype, (x, torch.float32), "wide") if narrow else x
    square = _step(node, aten.pow.Tensor_Scalar, (wide, 2), "square")
    mean = _step(node, aten.mean.dim, (square, [-1], True), "mean")
    shifted = _step(node, aten.add.Tensor, (mean, eps), "shifted")
    factor = _step(node, aten.rsqrt.default, (shifted,), "factor")
    normalized = _step(node, aten.mul.Tensor, (wide, factor), "normalized")
    if narrow and given.rounds_once:
        weight = _step(node, aten.to.dtype, (weight, torch.float32), "wide_weight")
    elif narrow:
        normalized = _step(node, aten.to.dtype, (normalized, dtype), "rounded")
    if given.offset:
        weight = _step(node, aten.add.Tensor, (weight, given.offset), "gain")
    if not narrow or not given.rounds_once:
        return call(node, aten.mul.Tensor, (normalized, weight), origin=node)
    product = _step(node, aten.mul.Tensor, (normalized, weight), "product")
    return call(node, aten.to.dtype, (product, dtype), origin=node)


def spell_layer_norm(node: fx.Node, state: FusionState) -> fx.Node:
    """`layer_norm(x, weight + offset, bias)`."""
    given = LayerNorm.of(node)
    gain = _step(node, aten.add.Tensor, (given.weight, given.offset), "gain")
    size = int(given.weight.meta["val"].shape[0])
    args = (given.x, [size], gain, given.bias, given.eps)
    return call(node, aten.layer_norm.default, args, origin=node)


def spell_rotary(node: fx.Node, state: FusionState) -> fx.Node:
    """`x * cos + turned(x) * sin`: halves are `concat(-x2, x1)`, pairs of neighbours (-b, a)."""
    x, tables = Rotary.of(node).x, Rotary.of(node).tables
    size = x.meta["val"].shape[-1]
    half = size // 2
    cos, sin = (
        state.call_once(node, aten.unsqueeze.default, (t, 1), suffix=".per_head") for t in tables
    )
    if Rotary.of(node).interleaved:
        first = _step(node, aten.slice.Tensor, (x, -1, 0, size, 2), "evens")
        second = _step(node, aten.slice.Tensor, (x, -1, 1, size, 2), "odds")
        negated = _step(node, aten.neg.default, (second,), "negated")
        pairs = _step(node, aten.stack.default, ([negated, first], -1), "pairs")
        rotated = _step(node, aten.flatten.using_ints, (pairs, -2), "rotated")
    else:
        first = _step(node, aten.slice.Tensor, (x, -1, 0, half), "first_half")
        second = _step(node, aten.slice.Tensor, (x, -1, half, 2 * half), "second_half")
        negated = _step(node, aten.neg.default, (second,), "negated")
        rotated = _step(node, aten.cat.default, ([negated, first], -1), "rotated")
    direct = _step(node, aten.mul.Tensor, (x, cos), "times_cos")
    turned = _step(node, aten.mul.Tensor, (rotated, sin), "times_sin")
    return call(node, aten.add.Tensor, (direct, turned), origin=node)


def spell_swiglu(node: fx.Node, state: FusionState) -> fx.Node:
    """`silu(gate) * up`."""
    gate, up = SwiGlu.of(node).gate, SwiGlu.of(node).up
    activated = _step(node, aten.silu.default, (gate,), "silu")
    return call(node, aten.mul.Tensor, (activated, up), origin=node)


def spell_geglu(node: fx.Node, state: FusionState) -> fx.Node:
    """`gelu(gate) * up`."""
    given = GeGlu.of(node)
    form = {"approximate": given.approximate}
    activated = call(node, aten.gelu.default, (given.gate,), form, origin=node, suffix=".gelu")
    return call(node, aten.mul.Tensor, (activated, given.up), origin=node)


def spell_gelu(node: fx.Node, state: FusionState) -> fx.Node:
    """The very call, for what the vendor's op does not take."""
    return call(node, aten.gelu.default, node.args, node.kwargs, origin=node)


def spell_attention(node: fx.Node, state: FusionState) -> fx.Node:
    """`scaled_dot_product_attention` with each key and value head repeated for its group."""
    given, mask = Attention.of(node), attended_mask(node, state)
    query, key, value = given.query, given.key, given.value
    heads, kv_heads = query.meta["val"].shape[1], key.meta["val"].shape[1]
    if size_key(heads) != size_key(kv_heads):
        groups = int(heads // kv_heads)
        repeat = aten.repeat_interleave.self_int
        key = _step(node, repeat, (key, groups, 1), "keys")
        value = _step(node, repeat, (value, groups, 1), "values")
    if given.sinks is not None or given.softcap:
        return _attention_by_scores(node, query, key, value, mask)
    args = (query, key, value, mask, 0.0, False)
    op = aten.scaled_dot_product_attention.default
    return call(node, op, args, {"scale": given.scale}, origin=node)


def _attention_by_scores(
    node: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node, mask: fx.Node | None
) -> fx.Node:
    """`softmax(cap(q @ k^T * scale) + mask, sinks)[..., :total] @ v`, the scores in float32."""
    given, dtype = Attention.of(node), query.meta["val"].dtype
    narrow = dtype not in (torch.float32, torch.float64)
    wide = torch.float32 if narrow else dtype

    def widened(x: fx.Node, suffix: str) -> fx.Node:
        same = x.meta["val"].dtype == wide
        return x if same else _step(node, aten.to.dtype, (x, wide), suffix)

    turned = _step(node, aten.transpose.int, (widened(key, "wide_keys"), 2, 3), "turned_keys")
    products = _step(node, aten.matmul.default, (widened(query, "wide_query"), turned), "products")
    scores = _step(node, aten.mul.Tensor, (products, given.scale), "scores")
    if given.softcap:
        parts = _step(node, aten.div.Tensor, (scores, given.softcap), "parts_of_cap")
        squashed = _step(node, aten.tanh.default, (parts,), "squashed")
        scores = _step(node, aten.mul.Tensor, (squashed, given.softcap), "capped")
    if mask is None:
        masked = scores
    elif mask.meta["val"].dtype == torch.bool:
        hidden = _step(node, aten.logical_not.default, (mask,), "hidden")
        masked = _step(node, aten.masked_fill.Scalar, (scores, hidden, -math.inf), "masked")
    else:
        masked = _step(node, aten.add.Tensor, (scores, mask), "masked")
    if given.sinks is not None:
        column = _step(
            node, aten.view.default, (widened(given.sinks, "wide"), [-1, 1, 1]), "column"
        )
        zeros = _step(node, aten.slice.Tensor, (masked, -1, 0, 1), "first")
        zeros = _step(node, aten.zeros_like.default, (zeros,), "zeros")
        sinks = _step(node, aten.add.Tensor, (zeros, column), "sinks")
        masked = _step(node, aten.cat.default, ([masked, sinks], -1), "with_sinks")
    weights = _step(node, aten.softmax.int, (masked, -1), "weights")
    if given.sinks is not None:
        weights = _step(node, aten.slice.Tensor, (weights, -1, 0, -1), "of_keys")
    value = widened(value, "wide_values")
    if not narrow:
        return call(node, aten.matmul.default, (weights, value), origin=node)
    result = _step(node, aten.matmul.default, (weights, value), "wide_result")
    return call(node, aten.to.dtype, (result, dtype), origin=node)


def spell_kronecker(node: fx.Node, state: FusionState) -> fx.Node:
    """`left^T X right` with each row of x as a matrix X `[a, b]`."""
    given = Kronecker.of(node)
    left, right = (int(f.meta["val"].shape[0]) for f in (given.left, given.right))
    runs = _step(node, aten.reshape.default, (given.x, [-1, left, right]), "runs")
    runs = _step(node, aten.matmul.default, (runs, given.right), "runs_right")
    turned = _step(node, aten.t.default, (given.left,), "left_turned")
    runs = _step(node, aten.matmul.default, (turned, runs), "runs_left")
    flat = _step(node, aten.reshape.default, (runs, [-1, left * right]), "flat")
    return call(node, aten.view_as.default, (flat, given.x), origin=node)


def _step(node: fx.Node, op: Callable[..., Any], args: tuple[Any, ...], suffix: str) -> fx.Node:
    return call(node, op, args, origin=node, suffix=f".{suffix}")


SPELLINGS: dict[Any, Callable[[fx.Node, FusionState], fx.Node]] = {
    panguq.rms_norm.default: spell_rms_norm,
    panguq.layer_norm.default: spell_layer_norm,
    panguq.kronecker.default: spell_kronecker,
    panguq.rotary.default: spell_rotary,
    panguq.swiglu.default: spell_swiglu,
    panguq.geglu.default: spell_geglu,
    aten.gelu.default: spell_gelu,
    panguq.attention.default: spell_attention,
    panguq.latent_attention.default: spell_latent_attention,
    panguq.quantize_per_channel.default: spell_quantize_per_channel,
    panguq.quantize_per_tensor.default: spell_quantize_per_tensor,
    panguq.quantize_per_token.default: spell_quantize_per_token,
    panguq.dequantize.default: spell_dequantize,
}
