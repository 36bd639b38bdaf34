"""Between transformers' cache objects and the flat tensors that a graph takes and returns."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


@functools.cache
def cache_name() -> str:
    """What the installed transformers calls the cache in a model's output and in `generate`."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    names = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def cache_argument(forward: Callable[..., Any]) -> str:
    """What this model's forward calls the cache, which for a user's own model may be another name
    than transformers'."""
    names = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), cache_name())


def cache_of(output: Any) -> Any:
    """The cache that a model returned, under either name."""
    return getattr(output, cache_name())


def make_cache(tensors: Sequence[Tensor]) -> Any:
    """A transformers DynamicCache that holds these keys and values, one pair a layer.

    The tensors are taken as they are: no copy, and no concatenation with an empty past.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    cache.layers = []
    for key, value in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values = key, value
        layer.dtype, layer.device = key.dtype, key.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def layer_tensors(cache: Any) -> list[Tensor]:
    """Keys and values of every layer, flat and in layer order; empty for a fresh cache."""
    return [t for x in cache.layers if x.is_initialized for t in (x.keys, x.values)]


def update_cache(cache: Any, tensors: Sequence[Tensor]) -> Any:
    """Let `cache` hold these grown keys and values, and return it."""
    fresh = make_cache(tensors)
    for index, layer in enumerate(fresh.layers):
        if index < len(cache.layers):
            cache.layers[index].__dict__.update(layer.__dict__)
        else:
            cache.layers.append(layer)
    return cache
