"""Between transformers' cache objects and the flat tensors that a graph takes and returns.

The tensors come layer by layer, as `Interface.cached_tensors` lists them: key and value, then the
states of convolutions and of linear attention.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from panguq.errors import InputError
from panguq.ir.interface import CacheLayer, cached_tensors

# What the installed transformers calls the cache, in a model's output and in `generate`.
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"
# What may keep a layer's keys and values, its states, or both; a layer's own kind comes first.
_KEYS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_STATES = (LinearAttentionLayer,)
_BOTH = (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
)
# The class of layers that keep nothing; older releases of transformers have none.
DUMMY_LAYERS: tuple[type, ...] = tuple(filter(None, [getattr(cache_utils, "DummyLayer", None)]))
_NOTHING = (*DUMMY_LAYERS, DynamicLayer)
_USE = "use transformers' DynamicCache, the default of generate, or its StaticCache"


def cache_argument(forward: Callable[..., Any]) -> str:
    """What this model's forward calls the cache, which for a user's own model may be another name
    than transformers'."""
    names = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), CACHE_NAME)


def cache_of(output: Any) -> Any:
    """The cache that a model returned, under either name."""
    return getattr(output, CACHE_NAME)


def layer_classes(layer: CacheLayer) -> tuple[type, ...]:
    """The classes of transformers that may keep what this layer does; the first is its own."""
    if layer.states:
        return _BOTH if layer.heads else _STATES
    return _KEYS if layer.heads else _NOTHING


def new_layer(layer: CacheLayer, made_of: type | None = None) -> Any:
    """An empty layer of a cache, of class `made_of` or of its own."""
    made = made_of or layer_classes(layer)[0]
    if not issubclass(made, LinearAttentionCacheLayerMixin):
        return made()
    counts = [sum(s.kind == kind for s in layer.states) for kind in ("conv", "recurrent")]
    return made(number_of_states=max(counts))


def make_cache(layers: Sequence[CacheLayer], tensors: Sequence[Tensor]) -> DynamicCache:
    """A transformers DynamicCache that holds these tensors, as `layers` say.

    The tensors are taken as they are: no copy, and no concatenation with an empty past.
    """
    cache = DynamicCache()
    cache.layers = [new_layer(layer) for layer in layers]
    for spec, layer, held in zip(layers, cache.layers, by_layer(layers, tensors), strict=True):
        hold(layer, spec, held)
    return cache


def by_layer(layers: Sequence[CacheLayer], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The flat tensors of a cache, a list for each layer."""
    split: list[list[Tensor]] = [[] for _ in layers]
    for cached, tensor in zip(cached_tensors(layers, ""), tensors, strict=True):
        split[cached.layer].append(tensor)
    return split


def hold(layer: Any, spec: CacheLayer, held: Sequence[Tensor]) -> None:
    """Let a dynamic layer hold all that its graph takes or returned."""
    if spec.heads:
        key, value = held[:2]
        layer.keys, layer.values = key, value
        layer.dtype, layer.device = key.dtype, key.device
        layer.is_initialized = True
    _hold_states(layer, spec, held)


def _hold_states(layer: Any, spec: CacheLayer, held: Sequence[Tensor]) -> None:
    for (kind, index), state in zip(_states(spec), held[2 * bool(spec.heads) :], strict=True):
        # What a graph returns is the end of a longer tensor, which a view would keep in memory.
        getattr(layer, f"{kind}_states")[index] = state.contiguous()
        getattr(layer, f"is_{kind}_states_initialized")[index] = True
        layer.has_previous_state[index] = True
        if kind == "conv":
            layer.conv_kernel_size[index] = state.shape[-1]
        if layer.device is None:
            layer.dtype, layer.device = state.dtype, state.device


def _states(spec: CacheLayer) -> list[tuple[str, int]]:
    """Kind of each of a layer's states, and its number among those of that kind."""
    kinds = [state.kind for state in spec.states]
    return [(kind, kinds[:at].count(kind)) for at, kind in enumerate(kinds)]


def layer_tensors(layers: Sequence[CacheLayer], cache: Any) -> list[Tensor]:
    """What a dynamic cache's layers hold, flat and in layer order."""
    return [t for spec, x in zip(layers, cache.layers, strict=True) for t in _all_held(spec, x)]


def _all_held(spec: CacheLayer, layer: Any) -> list[Tensor]:
    keys = [layer.keys, layer.values] if spec.heads else []
    return [*keys, *(getattr(layer, f"{kind}_states")[index] for kind, index in _states(spec))]


def check_cache(cache: Any, layers: Sequence[CacheLayer]) -> None:
    """Raise InputError for a cache that a compiled model of these layers cannot read."""
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise InputError(f"the cache is a {type(cache).__name__}", _USE)
    if getattr(cache, "offloading", False):
        raise InputError(
            "the cache is moved to and from an accelerator; a compiled model keeps it in place",
            "leave offloading out: " + _USE,
        )
    if len(cache.layers) not in (0, len(layers)):
        raise InputError(
            f"the cache has {len(cache.layers)} layers, the model {len(layers)}",
            "pass back the cache that this model returned",
        )
    foreign = {
        type(layer).__name__
        for layer, spec in zip(cache.layers, layers, strict=False)
        if type(layer) not in layer_classes(spec)
    }
    if foreign:
        raise InputError(
            f"the cache is a {type(cache).__name__} with layers {', '.join(sorted(foreign))}",
            _USE + "; a recipe with the pass quantize-kv-cache gives an int8 cache",
        )
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        raise InputError(
            "the cache records its past, to be cropped; a compiled model keeps one state of a "
            "convolution or of linear attention, which has no past to go back to",
            "generate without an assistant",
        )


def held_tensors(layers: Sequence[CacheLayer], cache: Any, new: int) -> list[Tensor]:
    """What a cache holds, flat and in layer order; empty for a fresh one.

    Raises InputError if it has dropped some of it, or has no room for `new` tokens more.
    """
    held = [_held(spec, layer, new) for spec, layer in zip(layers, cache.layers, strict=False)]
    some = [tensors for tensors in held if tensors]
    if some and len(some) < sum(bool(spec.heads or spec.states) for spec in layers):
        raise InputError(
            "some layers of the cache hold tokens and some hold none",
            "pass back the cache that this model returned, or begin again with all tokens",
        )
    return [tensor for tensors in some for tensor in tensors]


def _held(spec: CacheLayer, layer: Any, new: int) -> list[Tensor]:
    if spec.states and not all(layer.has_previous_state.values()):
        return []
    if not spec.heads:
        return _all_held(spec, layer)
    length = int(layer.get_seq_length())
    _check_room(spec, layer, length, new)
    if length == 0:
        return []
    key, value, *states = _all_held(spec, layer)
    return [*(_as_all_tokens(spec, x, length) for x in (key, value)), *states]


def _check_room(spec: CacheLayer, layer: Any, length: int, new: int) -> None:
    """Raise InputError if a static layer would drop tokens that are attended to later."""
    slides = isinstance(layer, StaticSlidingWindowLayer) and spec.window > 0
    if not isinstance(layer, StaticLayer) or (slides and layer.max_cache_len >= spec.window):
        return
    if length + new > layer.max_cache_len:
        raise InputError(
            f"the cache has room for {layer.max_cache_len} tokens; it holds {length} and would "
            f"take {new} more",
            "make it with a larger max_cache_len",
        )


def _as_all_tokens(spec: CacheLayer, held: Tensor, length: int) -> Tensor:
    """Keys or values `[batch, heads, length, ..]` of a layer that may have dropped the first.

    Zeros stand for those: the mask hides what lies a window or more before the first new token.
    """
    dropped = length - held.shape[2]
    if dropped <= 0:
        return held[:, :, :length]
    if not spec.window or held.shape[2] < spec.window - 1:
        raise InputError(
            f"the cache has seen {length} tokens and holds the last {held.shape[2]}",
            "begin again with all tokens; the graph reads more of them",
        )
    return pad(held, (0, 0, dropped, 0))


def update_cache(
    cache: Any, layers: Sequence[CacheLayer], tensors: Sequence[Tensor], new: int
) -> Any:
    """Let `cache` hold what a graph returned, the last `new` of its tokens new, and return it."""
    if not cache.layers:
        cache.layers.extend(make_cache(layers, tensors).layers)
        return cache
    for index, (spec, held) in enumerate(zip(layers, by_layer(layers, tensors), strict=True)):
        layer = cache.layers[index]
        if not isinstance(layer, StaticLayer):
            if isinstance(layer, DynamicSlidingWindowLayer):  # it would drop what the graph reads
                layer = cache.layers[index] = new_layer(spec)
            hold(layer, spec, held)
            continue
        key, value = held[:2]
        if is_empty_for_others(layer, key):
            layer.lazy_initialization(key, value)
        # Copies: a graph that writes into the layer's own memory returns a part of that.
        layer.update(key[:, :, -new:].clone(), value[:, :, -new:].clone())
        _hold_states(layer, spec, held)
    return cache


def is_empty_for_others(layer: Any, key: Tensor) -> bool:
    """Whether the layer holds nothing, in memory that was made for another dtype or batch.

    With chunked prefill transformers makes a static cache for floats before it knows of codes.
    """
    if not layer.is_initialized or int(layer.get_seq_length()) > 0:
        return False
    return bool(layer.keys.dtype != key.dtype or layer.keys.shape[:2] != key.shape[:2])
