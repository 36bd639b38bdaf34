"""Keep keys and values of past tokens as 8-bit codes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from panguq.errors import InputError
from panguq.ir.call_arguments import arguments
from panguq.ir.edit import call, erase_unused, fake_mode, label, tensor_node
from panguq.ir.node_meta import meta_of
from panguq.ir.ops import quantize  # noqa: F401  (registers the quantize ops)
from panguq.ir.properties import Property
from panguq.ir.run.sweep import sweep
from panguq.ir.views import results_of
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Table
from panguq.ranks import ranks

aten = torch.ops.aten
panguq = torch.ops.panguq

QUANT_MAX = 127
TOKENS = 2
"""The axis of a cached tensor `[batch, heads, tokens, d]` along which it grows."""

CacheKind = Literal["per_channel", "per_token", "float"]


@dataclass(frozen=True)
class Cached:
    """One cached tensor: the graph's `past` input, the `new` part, and `grown` = cat of both."""

    layer: int
    part: Literal["key", "value"]
    past: fx.Node
    new: fx.Node
    grown: fx.Node


@dataclass(frozen=True)
class QuantizeKvCache(Pass):
    """Before: `grown = cat(past, new)`, read by attention and returned.  After, for `keys` and
    `values` each as its option says:

    - `per_channel`, static: `past` and what is returned are int8 codes `[batch, heads, tokens, d]`,
      `grown = cat(past, round(new / scale))`, and attention reads `grown * scale`. For each head
      and channel `scale = max|new| / 127` over all calibration tokens, float32 `[heads, 1, d]`, as
      they are after rotary embedding; what exceeds it is clipped. A channel that was never alive
      has the scale of its head's largest.
    - `per_token`, dynamic: `grown = cat(past, round(new / s) * s)` with `s = max|new| / 127` of a
      token and head. The numbers are those of an 8-bit cache, and their memory is not: the graph
      has no place for the tokens' scales, so it keeps what the codes stand for, in the model's
      own dtype.
    - `float`: nothing.

    The numbers in the cache are those that attention read when they were new, so that generating
    token by token computes what one pass over all of them does. Keys have channels that are large
    in every token, values do not (Liu et al., KIVI, arXiv 2402.02750); at 8 bits a scale a channel
    serves both, and alone makes the memory a quarter of float32's.

    It belongs behind passes that rescale or rotate values (smoothquant, awq, rotate): they leave
    alone what runs through a quantized cache. The new dtypes go into `ctx.interface`, and the
    empty caches of `ctx.batches` and `ctx.probe` are made to fit.
    """

    name: ClassVar[str] = "quantize-kv-cache"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.CANONICAL, Property.FLOAT_CACHE})
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT_CACHE})
    needs_calibration: ClassVar[bool] = True
    divided: ClassVar[bool] = True
    keys: CacheKind = "per_channel"
    values: CacheKind = "per_channel"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        chosen = []
        for cached in find_cached(gm, ctx, result):
            if self._kind(cached) == "float":
                result.skip(cached.new, f"the recipe leaves {cached.part}s in floating point")
            else:
                chosen.append(cached)
        static = [cached for cached in chosen if self._kind(cached) == "per_channel"]
        amax = _observe(gm, ctx, static)
        rows = []
        for cached in chosen:
            kind = self._kind(cached)
            if kind == "per_channel":
                scale = channel_scale(amax[cached.new])
                _store_codes(gm, cached, ctx.store.put(scale))
                spread = (f"{float(scale.min()):.4g}", f"{float(scale.max()):.4g}")
            else:
                _round_new(cached)
                spread = ("", "")
            before, after = (_bytes_per_token(n) for n in (cached.new, cached.past))
            rows.append((cached.layer, cached.part, kind, *spread, before, after))
            result.changed += 1
        _fit_context(ctx, static)
        columns = ("layer", "part", "scales", "smallest_scale", "largest_scale",
                   "float_bytes_per_token", "bytes_per_token")  # fmt: skip
        result.tables["cache"] = Table(columns, tuple(rows))
        return result

    def _kind(self, cached: Cached) -> CacheKind:
        return self.keys if cached.part == "key" else self.values


def find_cached(gm: fx.GraphModule, ctx: PassContext, result: PassResult) -> list[Cached]:
    """The cached tensors that grow by concatenation; the others are skipped with a reason."""
    inputs = {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}
    output, results = next(reversed(gm.graph.nodes)), results_of(gm)
    cache = ctx.interface.cached_tensors()
    if not cache:
        result.skip(output, "the graph has no KV cache: it takes and returns no past keys")
    found = []
    for cached in cache:
        past = inputs[f"past_{cached.name}"]
        grown = results[ctx.interface.outputs.index(cached.name)]
        if cached.part not in ("key", "value"):
            result.skip(past, "it is the state of all tokens, which is rewritten at each of them")
            continue
        reason = _obstacle(past, grown)
        if reason is not None:
            result.skip(past, reason)
            continue
        new = arguments(grown)["tensors"][1]
        found.append(Cached(cached.layer, cached.part, past, new, grown))
    return found


def _obstacle(past: fx.Node, grown: fx.Node) -> str | None:
    """Why this cached tensor cannot be quantized, if so."""
    given = arguments(grown) if grown.target is aten.cat.default else {}
    parts, axis = given.get("tensors", ()), given.get("dim", 0) % 4
    if len(parts) != 2 or parts[0] is not past or axis != TOKENS:
        return f"{label(grown)}, which continues it, is not the past followed by new tokens"
    readers = [n for n in past.users if n is not grown and n.target is not aten.sym_size.int]
    if readers:
        return f"{label(readers[0])} reads the past beside {label(grown)}"
    return None


def channel_scale(amax: Tensor) -> Tensor:
    """Scales float32 `[heads, 1, d]` from the largest magnitudes `[heads, d]`."""
    largest = amax.amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return (torch.where(amax > 0, amax, largest) / QUANT_MAX).unsqueeze(1)


def _observe(gm: fx.GraphModule, ctx: PassContext, static: list[Cached]) -> dict[fx.Node, Tensor]:
    """The largest magnitude of every new key and value over all tokens, `[heads, d]` each."""
    if static:
        ctx.require_batches()
    seen: dict[fx.Node, Tensor] = {}

    def observe(node: fx.Node, value: Tensor) -> None:
        amax = value.float().abs().amax((0, TOKENS))
        seen[node] = torch.maximum(seen[node], amax) if node in seen else amax

    if static:
        watched = {cached.new for cached in static}
        sweep(gm, ranks().share(ctx.batches), watched, observe, ctx.progress)
    return {node: ranks().largest(amax) for node, amax in seen.items()}


def _store_codes(gm: fx.GraphModule, cached: Cached, scale: Tensor) -> None:
    """Let the graph take and return int8 codes, and attention read what they stand for."""
    past, new, grown = cached.past, cached.new, cached.grown
    dtype = new.meta["val"].dtype
    with fake_mode(gm):
        past.meta["val"] = torch.empty_like(past.meta["val"], dtype=torch.int8)
    scale_node = tensor_node(grown, f"cache.{cached.part}_{cached.layer}_scale", scale)
    codes = call(
        grown,
        panguq.quantize_per_channel.default,
        (new, scale_node, QUANT_MAX),
        origin=grown,
        suffix=_free(grown, ".quantize_per_channel"),
    )
    codes = call(
        grown,
        aten.cat.default,
        ([past, codes], TOKENS),
        origin=grown,
        suffix=_free(grown, ".codes"),
    )
    values = call(
        grown,
        panguq.dequantize.default,
        (codes, scale_node, None, dtype),
        origin=grown,
        suffix=_free(grown, ".dequantize_per_channel"),
    )
    output = next(reversed(gm.graph.nodes))
    output.replace_input_with(grown, codes)
    grown.replace_all_uses_with(values)
    erase_unused([grown])


def _round_new(cached: Cached) -> None:
    """Let the cache take what 8-bit codes of each new token would stand for."""
    new, grown = cached.new, cached.grown
    pair = call(
        grown,
        panguq.quantize_per_token.default,
        (new, QUANT_MAX),
        origin=grown,
        suffix=_free(grown, ".quantize_per_token"),
    )
    codes, scale = (
        call(grown, operator.getitem, (pair, index), origin=grown, suffix=_free(grown, suffix))
        for index, suffix in enumerate((".codes", ".scale"))
    )
    values = call(
        grown,
        panguq.dequantize.default,
        (codes, scale, None, new.meta["val"].dtype),
        origin=grown,
        suffix=_free(grown, ".dequantize_per_token"),
    )
    grown.update_arg(0, [cached.past, values])


def _free(grown: fx.Node, suffix: str) -> str:
    """The suffix, or a longer one where the label is taken: of latent attention, a linear reads the
    cache, and its input may have codes already."""
    taken = {meta_of(node).label for node in grown.graph.nodes}
    return f"{suffix}_of_cache" if f"{label(grown)}{suffix}" in taken else suffix


def _bytes_per_token(node: fx.Node) -> int:
    """Bytes of `[batch, heads, tokens, d]` for one token of one sequence."""
    value = node.meta["val"]
    return int(value.shape[1]) * int(value.shape[3]) * value.element_size()


def _fit_context(ctx: PassContext, static: list[Cached]) -> None:
    """Tell the interface which cached tensors are codes, and give the batches caches of codes."""
    if not static:
        return
    layers = list(ctx.interface.cache)
    for cached in static:
        fields: dict[str, object] = {f"{cached.part}_dtype": "int8"}
        layers[cached.layer] = layers[cached.layer].model_copy(update=fields)
    ctx.interface = ctx.interface.model_copy(update={"cache": tuple(layers)})
    names = {str(cached.past.target) for cached in static}

    def fitted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        held = [name for name in names if batch[name].numel()]
        if held:
            raise InputError(f"a calibration batch holds a float cache in {held[0]}")
        return {n: t.to(torch.int8) if n in names else t for n, t in batch.items()}

    ctx.batches = [fitted(batch) for batch in ctx.batches]
    ctx.probe = None if ctx.probe is None else fitted(ctx.probe)
