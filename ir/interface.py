"""What a graph takes and returns: names, sizes and limits, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FloatDtype = Annotated[
    str, Field(pattern=r"^(float64|float32|float16|bfloat16|float8_e(4m3fn|5m2))$")
]


class CacheState(BaseModel):
    """What a layer keeps of all past tokens together, `[batch, *shape]`; zeros before the first.

    `conv` is the end of a causal convolution's input, `[batch, channels, width]`; `recurrent` is
    the state of linear attention or of a state-space model, `[batch, heads, .., ..]`.
    """

    model_config = ConfigDict(frozen=True)
    kind: Literal["conv", "recurrent"]
    shape: tuple[int, ...]
    dtype: FloatDtype


class CacheLayer(BaseModel):
    """What one layer keeps: key `[batch, heads, past, key_dim]`, value `[.., value_dim]`, or none
    if it has no `heads`; then its `states`.

    `float` is the model's own dtype; `int8` means codes whose scales the graph holds. A token of a
    layer with a `window` attends to at most so many, itself the last; 0 means to all.
    """

    model_config = ConfigDict(frozen=True)
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = Field(default=0, ge=0)
    key_dtype: Literal["float", "int8"] = "float"
    value_dtype: Literal["float", "int8"] = "float"
    states: tuple[CacheState, ...] = ()


@dataclass(frozen=True)
class CachedTensor:
    """One tensor of a cache: of which layer, which part, and its sizes; None is that of the past.

    `part` is `key`, `value`, `conv` or `recurrent`. The graph takes `past_<name>` and returns
    `<name>`.
    """

    layer: int
    part: Literal["key", "value", "conv", "recurrent"]
    name: str
    sizes: tuple[int | None, ...]
    dtype: str

    @property
    def grows(self) -> bool:
        """Whether it has a row for every token."""
        return None in self.sizes


class Interface(BaseModel):
    """A graph's inputs in order, its outputs in order, and the sizes it can serve.

    A causal language model takes `input_ids` `[batch, seq]`, `attention_mask` (boolean
    `[batch, 1, seq, past + seq]`), `position_ids` `[batch, seq]`, `logit_positions` `[kept]`
    (which positions' logits are wanted), then what each layer keeps, a key and a value or states;
    it returns `logits` `[batch, kept, vocab]`, the grown keys and values and the new states. An
    encoder is a transformers model that reads whole sequences or images, without a cache: its
    inputs and outputs have the names that they have there, and `output_class` names the class of
    its output. Any other module takes and returns what its `forward` did when it was traced.
    `max_positions` is the most tokens, past and new, for which the graph is right, and
    `max_positions_reason` says what changes beyond, as a learned position table or a sliding window
    does; `positions_from_mask` says that the model numbers only real tokens; `size_limits` are the
    least and the largest value (None: any) of a named size for which the trace holds.
    """

    model_config = ConfigDict(frozen=True)
    kind: Literal["causal_lm", "encoder", "module"]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: dict[str, tuple[str | int, ...]]
    float_dtype: FloatDtype
    vocab_size: int | None = None
    max_positions: int | None = None
    max_positions_reason: str = ""
    positions_from_mask: bool = False
    size_limits: dict[str, tuple[int, int | None]] = {}
    cache: tuple[CacheLayer, ...] = ()
    returns: Literal["tensor", "tuple"] = "tuple"
    output_class: str = ""

    def cached_tensors(self) -> tuple[CachedTensor, ...]:
        """All tensors of the cache, in the order in which the graph takes and returns them."""
        return cached_tensors(self.cache, self.float_dtype)

    def cache_pairs(self) -> dict[str, str]:
        """Input name of each cached tensor to the output that continues it."""
        return {f"past_{cached.name}": cached.name for cached in self.cached_tensors()}


def cached_tensors(layers: Sequence[CacheLayer], float_dtype: str) -> tuple[CachedTensor, ...]:
    """The tensors of a cache, layer by layer: key and value, then states."""
    return _cached_tensors(tuple(layers), float_dtype)


@lru_cache(maxsize=64)  # every call of a model asks
def _cached_tensors(layers: tuple[CacheLayer, ...], float_dtype: str) -> tuple[CachedTensor, ...]:
    return tuple(
        cached
        for index, layer in enumerate(layers)
        for cached in _of_layer(index, layer, float_dtype)
    )


def _of_layer(index: int, layer: CacheLayer, float_dtype: str) -> Iterator[CachedTensor]:
    if layer.heads:
        dtypes = {"float": float_dtype, "int8": "int8"}
        key, value = (layer.heads, None, layer.key_dim), (layer.heads, None, layer.value_dim)
        yield CachedTensor(index, "key", f"key_{index}", key, dtypes[layer.key_dtype])
        yield CachedTensor(index, "value", f"value_{index}", value, dtypes[layer.value_dtype])
    seen = Counter[str]()
    for state in layer.states:
        number = f"_{seen[state.kind]}" if seen[state.kind] else ""
        seen[state.kind] += 1
        name = f"{state.kind}_{index}{number}"
        yield CachedTensor(index, state.kind, name, state.shape, state.dtype)
