"""What attention and rotary positions a graph can stand for, and up to which length.

The graph's attention is plain causal attention with rotary frequencies that are the same at
every length. A model that does something else from some length on is served up to there; one
that never does it is refused before the trace.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from panguq.errors import TraceError

FULL = "full_attention"
RECURRENT = ("linear_attention", "conv")
"""Kinds of layers that know of a mask which new tokens are real, and nothing else."""
_SLIDING = ("sliding_attention", "hybrid_sliding")
_HYBRID = ("hybrid", "hybrid_sliding")
"""Kinds of layers that attend, and keep states as those in RECURRENT do."""
_PLAIN = (FULL, "attention", "dense", "sparse", "moe", "mlp", "hybrid", *RECURRENT)
_WINDOWS = ("sliding_window", "sliding_window_size")
_OTHER_WINDOWS = ("keep_window_size", "attention_window_size", "local_attention_window_len")
_LENGTH_WORDS = ("window", "chunk", "local")


@dataclass(frozen=True)
class Chunk:
    """Attention within chunks of `size` tokens, counted from each row's first real one."""

    size: int


Reach = int | Chunk | None
"""How far a token attends: over a sliding window of so many tokens, in a chunk, or to all."""


@dataclass(frozen=True)
class LengthLimit:
    """The most tokens, past and new together, that a graph serves, and why no more."""

    positions: int
    reason: str


def attends_both_ways(model: Any) -> bool:
    """Whether the model's config says that its tokens see those after them.

    BERT and its kin are decoders where the config says so; that of a model which is always one may
    keep the default of False.
    """
    for settings in (model.config, model.config.get_text_config(decoder=True)):
        if getattr(settings, "is_causal", None) is False:
            return True
        if getattr(settings, "use_bidirectional_attention", None) in (True, "all"):
            return True
    no_decoder = getattr(model.config, "is_decoder", None) is False
    return no_decoder and not any(getattr(m, "is_causal", False) for m in model.modules())


def check_causal_modules(model: nn.Module, traced: Container[str]) -> None:
    """Raises TraceError for modules at the `traced` paths that say of themselves that they are not
    causal, where the config says nothing. Others, such as attention to an encoder that a decoder
    alone does not have, may say what they like."""
    for path, module in model.named_modules():
        if path in traced and getattr(module, "is_causal", None) is False:
            raise TraceError(
                f"the attention of {type(model).__name__} is not causal: is_causal is False in "
                f"{path}",
                "set is_causal to False in the config, so that the whole model is compiled as one "
                "that attends both ways",
            )


def attention_windows(model: nn.Module, config: Any) -> tuple[dict[str, Reach], list[LengthLimit]]:
    """The windows and chunks to be written into masks, and the lengths that others limit.

    They are given by kind of layer, or by "" where one mask serves all layers; there are none where
    a mask need not say it. Kinds in RECURRENT are among them where some layers have masks of that
    kind. transformers' own models, and panguq's, are told their windows by masks, so that the model
    is right at every length; another model may do otherwise beyond its window. Raises TraceError
    for layers of a kind that panguq does not know.
    """
    types = list(getattr(config, "layer_types", None) or ())
    sizes = {kind: _layer_window(model, config, types.index(kind), kind) for kind in set(types)}
    other = _first(config, _OTHER_WINDOWS)
    windows: dict[str, Reach] = dict(sizes)
    whole: Reach = None
    if not types and getattr(config, "use_sliding_window", True):
        whole = _first(config, _WINDOWS)
    elif set(types) == {"sliding_attention"}:
        whole = windows["sliding_attention"]
    if whole:
        windows = {"": whole}
    found = [size for size in (*windows.values(), other) if size]
    limits = []
    name = type(model).__module__
    theirs = name.startswith("transformers.")
    if theirs and whole and not types and not _makes_windowed_masks(model):
        return {}, []  # its config has a window, of which its forward knows nothing
    by_masks = (theirs or name.startswith("panguq.")) and not other
    for reach in () if by_masks else found:
        named = "chunk" if isinstance(reach, Chunk) else "sliding window"
        size = reach.size if isinstance(reach, Chunk) else reach
        limits.append(LengthLimit(size, f"beyond its {named}, attention hides tokens"))
    recurrent = keeps_states(types)
    if recurrent:  # such models ask for a mask by its form or by the layer's kind
        sliding = next((sizes[kind] for kind in _SLIDING if kind in sizes), None)
        windows = {FULL: None, **dict.fromkeys(RECURRENT), **sizes}
        windows |= {"sliding_attention": sliding} if sliding else {}
    return (windows if (found and by_masks) or recurrent else {}), limits


def _makes_windowed_masks(model: nn.Module) -> bool:
    """Whether the code of one of the model's modules uses transformers' masks with a window."""
    files = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules[name], "create_sliding_window_causal_mask") for name in files)


def keeps_states(types: Iterable[str]) -> bool:
    """Whether layers of these kinds keep the state of a convolution or of a recurrence."""
    return not {*RECURRENT, *_HYBRID}.isdisjoint(types)


def window_of(config: Any, windows: Mapping[str, Reach], index: int) -> int:
    """The most tokens that a layer attends to under masks with these windows; 0 means all."""
    types = list(getattr(config, "layer_types", None) or ())
    kind = types[index] if index < len(types) else ""
    reach = windows.get(kind, windows.get(""))
    return (reach.size if isinstance(reach, Chunk) else reach) or 0


def _layer_window(model: nn.Module, config: Any, index: int, kind: str) -> Reach:
    """How far a layer of this kind attends."""
    if kind in _PLAIN:
        return None
    if kind not in (*_SLIDING, "chunked_attention"):
        raise TraceError(
            f"layer {index} of {type(model).__name__} is of type {kind!r}"
            f"{_module_of_layer(model, index)}",
            "panguq traces layers of full, sliding or chunked attention, of linear attention and "
            "of convolutions",
        )
    names = _WINDOWS if kind in _SLIDING else ("attention_chunk_size",)
    size = _first(config, names)
    if size is None:
        raise TraceError(
            f"layer {index} of {type(model).__name__} is of type {kind!r}, and the config "
            "gives it no size",
            f"set {names[0]} in the config",
        )
    return size if kind in _SLIDING else Chunk(size)


def _module_of_layer(model: nn.Module, index: int) -> str:
    """`: module model.layers.0 (Block)`, the first module that a list of them holds there."""
    for path, module in model.named_modules():
        if path.endswith(f".{index}"):
            return f": module {path} ({type(module).__name__})"
    return ""


def _first(config: Any, keys: tuple[str, ...]) -> int | None:
    sizes = [getattr(config, key, None) for key in keys]
    return next((int(size) for size in sizes if size), None)


def reset_rotary_frequencies(model: nn.Module) -> list[LengthLimit]:
    """Give dynamic rotary embeddings the frequencies of short sequences, and say up to where.

    transformers recomputes them on longer sequences and keeps those of the longest yet seen.
    """
    found = []
    for module, layer, kind in _rotary_kinds(model):
        if "dynamic" in kind:
            prefix = f"{layer}_" if layer else ""
            original = getattr(module, f"{prefix}original_inv_freq")
            longest = int(module.original_max_seq_len)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", longest)
            reason = "beyond, its dynamic rotary frequencies change with the length"
            found.append(LengthLimit(longest, reason))
    return found


def keep_rotary_frequencies(skeleton: nn.Module) -> None:
    """Let dynamic rotary embeddings never recompute: from a state, which a graph has not."""
    for module, layer, kind in list(_rotary_kinds(skeleton)):
        fixed = kind.replace("dynamic", "fixed")
        module.rope_type = {**module.rope_type, layer: fixed} if layer else fixed


def _rotary_kinds(model: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """Every rotary embedding, the kind of layer it has frequencies for if it tells them apart,
    and the kind of its frequencies."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {"": kinds}).items():
            if isinstance(kind, str):
                yield module, layer, kind


def changes_with_length(model: nn.Module) -> int | None:
    """The largest length at which a rotary embedding of the model takes other frequencies."""
    lengths = [0]
    for module, layer, kind in _rotary_kinds(model):
        if kind == "longrope":
            rope = module.config.rope_parameters
            lengths.append(
                int((rope[layer] if layer else rope)["original_max_position_embeddings"])
            )
    return max(lengths) or None


def window_like_sizes(config: Any) -> list[int]:
    """The config's sizes by whose names a forward may branch on the length."""
    found = []
    stack = [config.get_text_config(decoder=True).to_dict()]
    while stack:
        for key, value in stack.pop().items():
            if isinstance(value, dict):
                stack.append(value)
            elif isinstance(value, int) and any(word in str(key) for word in _LENGTH_WORDS):
                found.append(value)
    return found
