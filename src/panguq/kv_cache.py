"""Between transformers' cache objects and the flat tensors that a graph takes and returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


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
