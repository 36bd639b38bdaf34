"""A transformers causal language model as a module of plain tensors, and the mask that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import (
    DynamicCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from panguq.errors import TraceError
from panguq.ir.interface import CacheLayer, cached_tensors
from panguq.ir.kv_cache import (
    by_layer,
    cache_argument,
    cache_of,
    hold,
    layer_classes,
    layer_tensors,
    new_layer,
)
from panguq.ir.length_limits import FULL, RECURRENT, Chunk, Reach
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)

MaskForm = Literal["attended", "added", "real_tokens"]
"""`attended` is the graph's own mask, `[batch, 1, seq, total]`, True where a query attends; `added`
is 0 there and the lowest float elsewhere; `real_tokens` is what users give, `[batch, total]`, of
which a model makes its own."""
OWN_ATTENTION = "panguq"


class CausalLMStep(nn.Module):
    """A transformers causal language model with its cache as stacked tensors.

    Stacking what is alike gives all layers one symbol for the length of the past, and a trace few
    inputs; the stacks disappear again when the graph is unlifted. `windows` say
    how far attention reaches by kind of layer, or by "" where all layers share one mask.
    """

    def __init__(self, model: Any, form: MaskForm, windows: dict[str, Reach]) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.windows = windows

    def keep(self, layers: Sequence[CacheLayer], float_dtype: str) -> None:
        """Let the cache consist of these layers."""
        self.layers = tuple(layers)
        self.tensors = cached_tensors(layers, float_dtype)
        alike: dict[object, list[int]] = {}
        for place, cached in enumerate(self.tensors):
            alike.setdefault((cached.part, cached.sizes, cached.dtype), []).append(place)
        self.stacks = list(alike.values())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        stacks: list[Tensor],
    ) -> tuple[Tensor, ...]:
        places = [place for alike in self.stacks for place in alike]
        parts = dict(zip(places, (t for stack in stacks for t in stack.unbind(0)), strict=True))
        growing = [
            stack
            for stack, alike in zip(stacks, self.stacks, strict=True)
            if self.tensors[alike[0]].grows
        ]
        past = growing[0].shape[3]
        for stack in growing[1:]:
            torch._check(stack.shape[3] == past)  # one symbol for all
        total = past + input_ids.shape[1]
        torch._check(attention_mask.shape[3] == total)  # no symbol of its own
        cache = self._cache([parts[place] for place in range(len(parts))])
        output = self.call(input_ids, attention_mask, position_ids, logit_positions, cache)
        return output.logits, *layer_tensors(self.layers, cache_of(output))

    def _cache(self, tensors: list[Tensor]) -> DynamicCache:
        cache = DynamicCache()
        cache.layers = []
        for spec, held in zip(self.layers, by_layer(self.layers, tensors), strict=True):
            layer = new_layer(spec, _TRACED.get(layer_classes(spec)[0]))
            hold(layer, spec, held)
            cache.layers.append(layer)
        return cache

    def call(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor | int,
        cache: DynamicCache,
    ) -> Any:
        """What the model itself returns, as a transformers output."""
        return self.model(
            input_ids=input_ids,
            attention_mask=self._mask(attention_mask),
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=logit_positions,
            **{cache_argument(self.model.forward): cache},
        )

    def _mask(self, attended: Tensor) -> Any:
        """The mask as the model reads it; one for each kind of layer where these differ."""
        if self.form == "real_tokens":  # the last token attends to every real one
            return attended[:, 0, -1].long()
        made = {reach: _within(attended, reach) for reach in dict.fromkeys(self.windows.values())}
        own = _attend_to_themselves(attended)
        if self.form == "added":
            attended = self._added(attended)
            made = {reach: self._added(mask) for reach, mask in made.items()}
        masks = {kind: made[reach] for kind, reach in self.windows.items()}
        if any(kind in RECURRENT for kind in masks):
            masks = {FULL: attended, **masks}
            masks |= dict.fromkeys(RECURRENT, own)
        return masks.get("", masks) if masks else attended

    def _added(self, attended: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        zero = torch.zeros((), dtype=dtype, device=attended.device)
        return torch.where(attended, zero, torch.finfo(dtype).min)


class _TracedStates(LinearAttentionLayer):
    """Keeps states as values, where transformers' own layers write into them."""

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **unused: Any) -> Tensor:
        whole = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        self.conv_states[state_idx] = whole[..., -self.conv_kernel_size[state_idx] :]
        return whole

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **unused: Any
    ) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class _TracedStatesAndKeys(_TracedStates, LinearAttentionAndFullAttentionLayer):
    pass


_TRACED: dict[type, type] = {
    LinearAttentionLayer: _TracedStates,
    LinearAttentionAndFullAttentionLayer: _TracedStatesAndKeys,
}


def _attend_to_themselves(attended: Tensor) -> Tensor:
    """Which new tokens do, boolean `[batch, seq]`: all real ones, and no padding."""
    batch, _, seq, total = attended.shape
    own = torch.arange(total - seq, total, device=attended.device)[None, :, None]
    return attended[:, 0].gather(2, own.expand(batch, seq, 1)).squeeze(2)


def _within(attended: Tensor, reach: Reach) -> Tensor:
    """The mask without keys that lie a window or more before their query, or in another chunk."""
    if reach is None:
        return attended
    seq, total = attended.shape[-2:]
    keys = torch.arange(total, device=attended.device)
    if isinstance(reach, Chunk):
        before = attended[:, 0, -1].cumsum(-1).eq(0).sum(-1, keepdim=True)  # padding on the left
        chunks = (keys - before).div(reach.size, rounding_mode="floor")
        own = chunks[:, total - seq :]
        return torch.logical_and(attended, (own[:, :, None] == chunks[:, None, :])[:, None])
    queries = torch.arange(seq, device=attended.device)[:, None] + (total - seq)
    return torch.logical_and(attended, keys > queries - reach)


def choose_attention(skeleton: Any) -> None:
    """Let a copied model attend through one op that a trace shows whole.

    Where torch's scaled_dot_product_attention is not enough, since scores are capped or there are
    sinks, it is `panguq.attention`.
    """
    try:
        skeleton.set_attn_implementation("sdpa")
    except ValueError:
        ALL_ATTENTION_FUNCTIONS.register(OWN_ATTENTION, _attention)
        skeleton.set_attn_implementation(OWN_ATTENTION)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `[batch, seq, heads, d]`, and no weights.

    A window is in the mask already; dropout is off.
    """
    if attention_mask is None or (position_bias is not None and (softcap or s_aux is not None)):
        raise TraceError(
            f"{type(module).__name__} attends without a mask, or with a bias of positions and with "
            "sinks or a cap of its scores",
            "panguq has attention with a mask and either of them",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if position_bias is not None:
        lowest = torch.finfo(position_bias.dtype).min
        bias = torch.where(attention_mask, position_bias, lowest).to(query.dtype)
        attend = functional.scaled_dot_product_attention
        return attend(query, key, value, bias, scale=scale, enable_gqa=True).transpose(1, 2), None
    attention = torch.ops.panguq.attention.default
    result = attention(query, key, value, attention_mask, scale, s_aux, softcap or 0.0)
    return result.transpose(1, 2), None


def makes_its_own_mask(model: Any) -> bool:
    """Whether the model's attention is older than transformers' attention functions, so that it may
    read a mask in a way of its own."""
    follows = getattr(model, "_can_set_attn_implementation", None)
    return follows is not None and not follows()
