"""A compiled language model: called like the model it came from, generates like one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from panguq.artifact import LOWERED, Artifact
from panguq.compiled_module import CompiledTransformer, as_compiled, on_cpu
from panguq.data.inputs import check_ids, joined_logits, past_length, prepare, takes_empty_mask
from panguq.errors import InputError
from panguq.generation import Generates
from panguq.ir.cache_memory import remember, with_memory
from panguq.ir.kv_cache import CACHE_NAME, check_cache, held_tensors, make_cache, update_cache
from panguq.lowering.run.write_into_cache import write_into_cache, written_into

PREFILL_CHUNK = 2048
"""The most tokens of each sequence that a graph reads at once; a longer prompt is read in parts."""


class CompiledCausalLM(CompiledTransformer, Generates):
    """A compiled causal language model with transformers' calling convention and `generate`."""

    def __init__(self, artifact: Artifact, stage: str = LOWERED) -> None:
        super().__init__(artifact, stage)
        self.generation_config = artifact.generation_config or GenerationConfig.from_model_config(
            artifact.config
        )
        self.empty_mask = takes_empty_mask(self.graph)

    def _as_run(self, gm: fx.GraphModule) -> fx.GraphModule:
        if self._device.type == "cpu":
            write_into_cache(gm, self.interface)
        return gm

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Any = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[batch, kept, vocab]` and the grown cache for token ids `[batch, seq]`.

        `cache` (`past_key_values` to transformers before 5.24; both names work) is what an earlier
        call returned, or transformers' DynamicCache or StaticCache, and is updated in place, as
        transformers' models do; `attention_mask` `[batch, past + seq]`. Without `use_cache` and
        `return_dict` the config decides. Raises InputError for what the graph cannot serve.
        """
        if cache is not None and past_key_values is not None:
            raise InputError("cache and past_key_values are both given", "they are one thing")
        given = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True)
        keeps = bool(use_cache) or given is not None
        parts = self._parts(input_ids)
        logits: list[Tensor] = []
        memory: list[Tensor] = []
        grown: list[Tensor] = []
        for tokens in parts:
            inputs = self._prepared(
                input_ids, attention_mask, position_ids, given, logits_to_keep, keeps, unused,
                tokens, memory,
            )  # fmt: skip
            with as_compiled(self._device):
                found, *grown = self._running()(*inputs)
            logits.append(found)
            memory = self._continued(inputs, grown)
        held = self._kept(given, grown, memory, input_ids.shape[1]) if keeps else None
        whole = logits[0] if len(parts) == 1 else joined_logits(logits, parts, logits_to_keep)
        output = CausalLMOutputWithPast(**{"logits": whole, CACHE_NAME: held})
        return self._output(output, return_dict)

    @torch.compiler.disable
    def _parts(self, input_ids: Any) -> list[tuple[int, int]]:
        """The new tokens in parts of at most `PREFILL_CHUNK`, each a first number and one behind:
        what a part computes is forgotten before the next, so that memory grows with the length."""
        seq = input_ids.shape[1] if isinstance(input_ids, Tensor) and input_ids.dim() == 2 else 0
        whole = seq <= PREFILL_CHUNK or not written_into(self.executable)
        step = max(seq, 1) if whole else PREFILL_CHUNK
        return [(start, min(start + step, seq)) for start in range(0, max(seq, 1), step)]

    def _continued(self, inputs: list[Any], grown: list[Tensor]) -> list[Tensor]:
        """What the next part finds in the cache: the memory that was written into, and states."""
        names = written_into(self.executable)
        pairs = zip(self.interface.cache_pairs(), inputs[4:], grown, strict=False)
        return [memory if name in names else state for name, memory, state in pairs]

    @torch.compiler.disable  # it looks at values
    def _prepared(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        logits_to_keep: int | Tensor,
        keeps: bool,
        unused: dict[str, Any],
        tokens: tuple[int, int],
        memory: list[Tensor],
    ) -> list[Any]:
        """The inputs of the graph that runs, in order, where it runs, for a part of the tokens.

        `memory` is what the parts before it left, if there were any.
        """
        refused = sorted(
            name for name, value in unused.items() if value is not None and value is not False
        )
        if refused:
            raise InputError(
                f"a compiled model does not take {', '.join(refused)}",
                "its graph has token ids, mask, positions and cache as inputs",
            )
        past: list[Tensor] = []
        if cache is not None:
            check_cache(cache, self.interface.cache)
            new = check_ids(self.interface, on_cpu(input_ids)).shape[1]
            past = held_tensors(self.interface.cache, cache, new)
        inputs = prepare(
            self.interface,
            on_cpu(input_ids),
            on_cpu(attention_mask),
            on_cpu(position_ids),
            past,
            logits_to_keep,
            empty_mask=self.empty_mask,
            tokens=tokens,
        )
        if self._device.type != "cpu":
            return [x.to(self._device) for x in inputs.values()]
        others, past = list(inputs.values())[:4], list(inputs.values())[4:]
        names = written_into(self.executable)
        if not names:
            return [*others, *past]
        length = past_length(self.interface, past) + tokens[0]
        if not memory:
            room = input_ids.shape[1]
            memory = with_memory(self.interface.cache, cache, past, names, room, spare=keeps)
        return [*others, *memory, length]

    @torch.compiler.disable
    def _kept(self, cache: Any, grown: list[Tensor], memory: list[Tensor], new: int) -> Any:
        """The cache to return, which holds `grown`, the last `new` tokens of them new."""
        layers = self.interface.cache
        if cache is None:
            cache = make_cache(layers, grown)
        else:
            update_cache(cache, layers, grown, new)
        remember(layers, cache, memory)
        return cache
