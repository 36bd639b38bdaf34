"""What each layer of a causal language model keeps in its cache, asked of one forward."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from panguq.errors import TraceError
from panguq.ir.causal_lm import CausalLMStep
from panguq.ir.interface import CacheLayer, CacheState
from panguq.ir.kv_cache import CACHE_NAME, DUMMY_LAYERS
from panguq.ir.length_limits import keeps_states, window_of
from panguq.tensors.dtypes import dtype_name


def cache_layers(step: CausalLMStep, mode: FakeTensorMode | None) -> tuple[CacheLayer, ...]:
    """What each layer keeps, asked of one forward on fake tensors.

    mode: that of the model's tensors, if they are fake. Raises TraceError for a layer that keeps
    something else than one key and one value a token, and states.
    """
    batch, seq = 3, 5
    name = type(step.model).__name__
    config = step.model.config.get_text_config(decoder=True)
    with mode or FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        output = step.call(
            torch.zeros(batch, seq, dtype=torch.long),
            torch.ones(batch, 1, seq, seq, dtype=torch.bool),
            torch.arange(seq).expand(batch, seq),
            1,
            _fresh_cache(step.model),
        )
    returned = getattr(output, CACHE_NAME, None)
    if returned is None:
        raise TraceError(
            f"{name} returns no cache of keys and values, though it takes one",
            "panguq traces language models that continue from a cache",
        )
    found = []
    for index, layer in enumerate(returned.layers):
        heads, key_dim, value_dim = _keys(layer, index, name, batch, seq)
        states = _states(layer, index, name)
        window = window_of(config, step.windows, index) if heads else 0
        found.append(
            CacheLayer(
                heads=heads, key_dim=key_dim, value_dim=value_dim, window=window, states=states
            )
        )
    layers = tuple(found)
    _check_attends(any(layer.heads for layer in layers), step.model)
    return layers


def check_keeps_a_cache(model: Any) -> None:
    """Raises TraceError for a model whose forward takes no cache: it reads all tokens each time."""
    if not {"cache", "past_key_values"} & inspect.signature(model.forward).parameters.keys():
        raise TraceError(
            f"{type(model).__name__} keeps no cache of keys and values: its forward takes none",
            "panguq traces language models that continue from a cache",
        )


def _check_attends(attends: bool, model: nn.Module) -> None:
    if not attends:
        path, block = next((p, m) for p, m in model.named_modules() if p.endswith(".0"))
        raise TraceError(
            f"no layer of {type(model).__name__} attends to keys, and module {path} "
            f"({type(block).__name__}) keeps a state alone",
            "panguq traces models with attention, whose cache tells how long the past is",
        )


def _fresh_cache(model: Any) -> DynamicCache:
    """As transformers makes it for this model, but all layers of attention keep all tokens."""
    config = model.config.get_text_config(decoder=True)
    states = keeps_states(getattr(config, "layer_types", None) or ())
    if not states and not getattr(config, "num_kv_shared_layers", 0):
        return DynamicCache()
    cache = DynamicCache(config=config)
    _check_attends(any(isinstance(x, CacheLayerMixin) for x in cache.layers), model)
    cache.layers = [_without_window(layer) for layer in cache.layers]
    return cache


def _without_window(layer: Any) -> Any:
    """The layer, or for one that drops tokens an empty one that keeps all of them."""
    if isinstance(layer, LinearAttentionAndSlidingWindowAttentionLayer):
        return LinearAttentionAndFullAttentionLayer(len(layer.conv_states))
    return DynamicLayer() if isinstance(layer, DynamicSlidingWindowLayer) else layer


_WITHOUT_KEYS = (*DUMMY_LAYERS, LinearAttentionCacheLayerMixin)


def _keys(layer: Any, index: int, name: str, batch: int, seq: int) -> tuple[int, int, int]:
    """Heads and sizes of a layer's keys and values; zeros if it has no place for them."""
    if isinstance(layer, _WITHOUT_KEYS) and not isinstance(layer, CacheLayerMixin):
        return 0, 0, 0
    shapes = [getattr(getattr(layer, part, None), "shape", None) for part in ("keys", "values")]
    sizes = [tuple(shape) for shape in shapes if shape is not None and len(shape) == 4]
    plain = [size for size in sizes if (size[0], size[2]) == (batch, seq)]
    if len(plain) != 2 or plain[0][1] != plain[1][1]:
        raise TraceError(
            f"layer {index} of {name} keeps a {type(layer).__name__} of "
            f"{' and '.join(str(list(s)) for s in sizes) or 'no keys and values'}",
            "panguq traces a cache of one key and one value a token",
        )
    key, value = plain
    return key[1], key[3], value[3]


def _states(layer: Any, index: int, name: str) -> tuple[CacheState, ...]:
    """The states of convolutions and recurrences that a layer keeps."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return ()
    found = []
    kinds: tuple[Literal["conv", "recurrent"], ...] = ("conv", "recurrent")
    for kind in kinds:
        held = getattr(layer, f"{kind}_states")
        numbers = [number for number, state in held.items() if state is not None]
        if numbers != list(range(len(numbers))):
            raise TraceError(
                f"layer {index} of {name} keeps {kind} states {numbers} and none before",
                "panguq traces states that are numbered from 0",
            )
        for number in numbers:
            shape = tuple(int(size) for size in held[number].shape[1:])
            found.append(CacheState(kind=kind, shape=shape, dtype=dtype_name(held[number].dtype)))
    return tuple(found)
