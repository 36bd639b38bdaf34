"""What a graph takes and returns: names, sizes and limits, as plain data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CacheLayer(BaseModel):
    """One layer's KV cache: key `[batch, heads, past, key_dim]`, value `[.., value_dim]`.

    `float` is the model's own dtype; `int8` means codes whose scales the graph holds.
    """

    model_config = ConfigDict(frozen=True)
    heads: int
    key_dim: int
    value_dim: int
    key_dtype: Literal["float", "int8"] = "float"
    value_dtype: Literal["float", "int8"] = "float"


class Interface(BaseModel):
    """A graph's inputs in order, its outputs in order, and the sizes it can serve.

    A causal language model takes `input_ids` `[batch, seq]`, `attention_mask` (boolean
    `[batch, 1, seq, past + seq]`), `position_ids` `[batch, seq]`, `logit_positions` `[kept]`
    (which positions' logits are wanted), then a key and a value per layer; it returns
    `logits` `[batch, kept, vocab]` and the grown keys and values. Any other module takes
    and returns what its `forward` did when it was traced. `max_positions` is the most tokens, past
    and new, for which the graph is right, and `max_positions_reason` says what changes beyond, as
    a learned position table or a sliding window does; `positions_from_mask` says that the model
    numbers only real tokens; `size_limits` are the least and the largest value (None: any) of a
    named size for which the trace holds.
    """

    model_config = ConfigDict(frozen=True)
    kind: Literal["causal_lm", "module"]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: dict[str, tuple[str | int, ...]]
    float_dtype: str = Field(pattern=r"^(float64|float32|float16|bfloat16|float8_e(4m3fn|5m2))$")
    vocab_size: int | None = None
    max_positions: int | None = None
    max_positions_reason: str = ""
    positions_from_mask: bool = False
    size_limits: dict[str, tuple[int, int | None]] = {}
    cache: tuple[CacheLayer, ...] = ()
    returns: Literal["tensor", "tuple"] = "tuple"

    def cache_pairs(self) -> dict[str, str]:
        """Input name of each cached tensor to the output that continues it."""
        names = [n for i in range(len(self.cache)) for n in (f"key_{i}", f"value_{i}")]
        return {f"past_{name}": name for name in names}
