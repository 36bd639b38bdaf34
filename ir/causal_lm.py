"""A transformers causal language model as a module of plain tensors, to be traced.

How a model wants its mask is here, and what its layers keep in their cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from panguq.errors import TraceError
from panguq.ir.interface import CacheLayer, CacheState, cached_tensors
from panguq.ir.kv_cache import (
    CACHE_NAME,
    DUMMY_LAYERS,
    by_layer,
    cache_argument,
    cache_of,
    hold,
    layer_classes,
    layer_tensors,
    new_layer,
)
from panguq.ir.length_limits import FULL, RECURRENT, Chunk, Reach, keeps_states, window_of
from panguq.ir.ops import canonical as canonical_ops  # noqa: F401  (registers torch.ops.panguq.*)
from panguq.tensors.dtypes import dtype_name

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
