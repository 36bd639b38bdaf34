"""Memory in which a cache grows without being copied.

A layer's keys are then the first tokens of a longer tensor. Dynamic layers of transformers know
nothing of it: which memory belongs to a layer is kept here, and holds only as long as the layer's
keys are still its beginning. A cache that was reordered, repeated or copied gets memory of its own
at the next call; one that was cropped is written over from there on, as a static cache is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers.cache_utils import StaticLayer

from panguq.ir.interface import CachedTensor, CacheLayer, cached_tensors
from panguq.ir.kv_cache import by_layer, is_empty_for_others

TOKENS = 2
"""The axis of a cached tensor `[batch, heads, tokens, d]` along which it grows."""
LEAST_SPARE = 64
SPARE_PART = 4
"""Memory that is outgrown is followed by a fourth, or 64 tokens, more than is needed, so that each
token is copied four times at most on the whole."""

# By layer: what its keys and its values are the beginning of, by the name of the part.
_MEMORY: WeakKeyDictionary[Any, dict[str, Tensor]] = WeakKeyDictionary()


def with_memory(
    layers: Sequence[CacheLayer],
    cache: Any,
    past: Sequence[Tensor],
    names: Collection[str],
    room: int,
    spare: bool,
) -> list[Tensor]:
    """The tensors of a cache, those called in `names` in memory with room for `room` tokens more.

    cache: the transformers cache that `past`, `[batch, heads, length, d]` each, was read from, or
    None. Memory is `[batch, heads, capacity, d]` with the past in its first tokens: what the
    layer has, if it is large enough, else a copy, larger than needed where `spare` is true.
    """
    held = () if cache is None else cache.layers
    if held:
        _prepare_static(layers, cache, past)
    return [
        _memory(held[cached.layer] if held else None, cached, tensor, room, spare)
        if f"past_{cached.name}" in names
        else tensor
        for cached, tensor in zip(cached_tensors(layers, ""), past, strict=True)
    ]


def _prepare_static(layers: Sequence[CacheLayer], cache: Any, past: Sequence[Tensor]) -> None:
    """Let static layers that hold nothing have memory for keys and values like these."""
    for index, held in enumerate(by_layer(layers, past)):
        layer = cache.layers[index]
        if isinstance(layer, StaticLayer) and (
            not layer.is_initialized or is_empty_for_others(layer, held[0])
        ):
            layer.lazy_initialization(held[0], held[1])


def remember(layers: Sequence[CacheLayer], cache: Any, memory: Sequence[Tensor]) -> None:
    """Let the layers of a cache grow in this memory at the next call, too."""
    for cached, tensor in zip(cached_tensors(layers, ""), memory, strict=True):
        layer = cache.layers[cached.layer]
        if not cached.grows or isinstance(layer, StaticLayer):
            continue
        if _begins(getattr(layer, f"{cached.part}s"), tensor):
            _MEMORY.setdefault(layer, {})[cached.part] = tensor


def _memory(layer: Any, cached: CachedTensor, past: Tensor, room: int, spare: bool) -> Tensor:
    needed = past.shape[TOKENS] + room
    own = _own(layer, cached)
    if own is not None and own.shape[TOKENS] >= needed and _begins(past, own):
        return own
    more = max(LEAST_SPARE, needed // SPARE_PART) if spare else 0
    batch, heads, length, d = past.shape
    made = past.new_empty((batch, heads, needed + more, d))
    made[:, :, :length].copy_(past)
    return made


def _own(layer: Any, cached: CachedTensor) -> Tensor | None:
    if isinstance(layer, StaticLayer):
        found: Tensor = getattr(layer, f"{cached.part}s")
        return found
    return None if layer is None else _MEMORY.get(layer, {}).get(cached.part)


def _begins(past: Tensor, memory: Tensor) -> bool:
    """Whether the past is the first tokens of this memory, which may be none."""
    same = past.dtype == memory.dtype and past.device == memory.device
    batch, heads, length, d = past.shape
    if not same or memory.shape[:TOKENS] != (batch, heads) or memory.shape[-1] != d:
        return False
    return length == 0 or (
        past.data_ptr() == memory.data_ptr() and past.stride() == memory.stride()
    )
