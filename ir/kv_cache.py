"""Between transformers' cache objects and the flat tensors that a graph takes and returns."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from panguq.errors import InputError

# What the installed transformers calls the cache, in a model's output and in `generate`.
_FIELDS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"
SERVED_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_USE = "use transformers' DynamicCache, the default of generate, or its StaticCache"


def cache_argument(forward: Callable[..., Any]) -> str:
    """What this model's forward calls the cache, which for a user's own model may be another name
    than transformers'."""
    names = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), CACHE_NAME)


def cache_of(output: Any) -> Any:
    """The cache that a model returned, under either name."""
    return getattr(output, CACHE_NAME)


def make_cache(tensors: Sequence[Tensor]) -> DynamicCache:
    """A transformers DynamicCache that holds these keys and values, one pair a layer.

    The tensors are taken as they are: no copy, and no concatenation with an empty past.
    """
    cache = DynamicCache()
    cache.layers = []
    for key, value in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        _hold(layer, key, value)
        cache.layers.append(layer)
    return cache


def _hold(layer: Any, key: Tensor, value: Tensor) -> None:
    layer.keys, layer.values = key, value
    layer.dtype, layer.device = key.dtype, key.device
    layer.is_initialized = True


def layer_tensors(cache: Any) -> list[Tensor]:
    """Keys and values of a dynamic cache's layers, flat and in layer order."""
    return [t for x in cache.layers if x.is_initialized for t in (x.keys, x.values)]


def check_cache(cache: Any, layers: int) -> None:
    """Raise InputError for a cache that a compiled model of so many layers cannot read."""
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise InputError(f"the cache is a {type(cache).__name__}", _USE)
    if getattr(cache, "offloading", False):
        raise InputError(
            "the cache is moved to and from an accelerator; a compiled model keeps it in place",
            "leave offloading out: " + _USE,
        )
    foreign = {type(layer).__name__ for layer in cache.layers if type(layer) not in SERVED_LAYERS}
    if foreign:
        raise InputError(
            f"the cache is a {type(cache).__name__} with layers {', '.join(sorted(foreign))}",
            _USE + "; a recipe with the pass quantize-kv-cache gives an int8 cache",
        )
    if len(cache.layers) not in (0, layers):
        raise InputError(
            f"the cache has {len(cache.layers)} layers, the model {layers}",
            "pass back the cache that this model returned",
        )


def held_tensors(cache: Any, new: int) -> list[Tensor]:
    """Keys and values that a cache holds, flat and in layer order; empty for a fresh one.

    Raises InputError if it has dropped some of them, or has no room for `new` tokens more.
    """
    return [t for layer in cache.layers for t in _held(layer, new)]


def _held(layer: Any, new: int) -> tuple[Tensor, ...]:
    length = int(layer.get_seq_length())
    if isinstance(layer, StaticLayer) and length + new > layer.max_cache_len:
        sliding = isinstance(layer, StaticSlidingWindowLayer)
        raise InputError(
            f"the cache has room for {layer.max_cache_len} tokens; it holds {length} and would "
            f"take {new} more",
            "a static cache keeps no more than a layer's sliding window; use a dynamic one"
            if sliding
            else "make it with a larger max_cache_len",
        )
    if length == 0:
        return ()
    if not isinstance(layer, StaticLayer) and layer.keys.shape[-2] < length:
        raise InputError(
            f"the cache has seen {length} tokens and holds the last {layer.keys.shape[-2]}",
            "begin again with all tokens; a graph reads every one of them",
        )
    return layer.keys[:, :, :length], layer.values[:, :, :length]


def update_cache(cache: Any, tensors: Sequence[Tensor], new: int) -> Any:
    """Let `cache` hold these grown keys and values, the last `new` of them new, and return it."""
    if not cache.layers:
        cache.layers.extend(make_cache(tensors).layers)
        return cache
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    for index, (layer, (key, value)) in enumerate(zip(cache.layers, pairs, strict=True)):
        if isinstance(layer, DynamicLayer):
            if type(layer) is not DynamicLayer:  # it would drop what the graph reads
                layer = cache.layers[index] = DynamicLayer()
            _hold(layer, key, value)
            continue
        if _is_empty_for_others(layer, key):
            layer.lazy_initialization(key, value)
        layer.update(key[:, :, -new:], value[:, :, -new:])
    return cache


def _is_empty_for_others(layer: Any, key: Tensor) -> bool:
    """Whether the layer holds nothing, in memory that was made for another dtype or batch.

    With chunked prefill transformers makes a static cache for floats before it knows of codes.
    """
    if not layer.is_initialized or int(layer.get_seq_length()) > 0:
        return False
    return bool(layer.keys.dtype != key.dtype or layer.keys.shape[:2] != key.shape[:2])
