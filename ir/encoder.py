"""A transformers model that reads whole sequences, images or sounds, as a graph without a cache.

Encoders, classifiers, rerankers, embedding models, and language models whose attention goes both
ways. Inputs and outputs keep the names that they have in transformers; the model makes its own
mask, in the graph, from the `attention_mask` `[batch, seq]` that users give.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from panguq.errors import InputError, TraceError
from panguq.ir.call_arguments import arguments
from panguq.ir.experts import check_experts
from panguq.ir.export import fake_mode_of, skeleton_of
from panguq.ir.interface import Interface
from panguq.ir.length_limits import keep_rotary_frequencies, reset_rotary_frequencies
from panguq.ir.trace import trace_module
from panguq.ir.trace_causal_lm import BATCH, SEQ, encoder_decoder, is_causal_lm

IDS = "input_ids"
OF_TOKENS = ("attention_mask", "token_type_ids")
"""Inputs `[batch, seq]` beside the ids, with the value that each has where it is left out."""
DEFAULTS = {"attention_mask": 1, "token_type_ids": 0}
PIXELS, FEATURES = "pixel_values", "input_features"
_SIZE = 224
_EXAMPLES = "give example_inputs={name: tensor}, with every size at least 2"

Examples = Sequence[Tensor] | Mapping[str, Tensor] | None


def is_encoder(model: Any) -> bool:
    """Whether this is a transformers model that does not continue sequences from a cache."""
    return isinstance(model, PreTrainedModel) and not is_causal_lm(model)


def reads_text(model: Any) -> bool:
    """Whether token ids are all that this encoder needs."""
    return set(input_names(model)) <= {IDS, *OF_TOKENS}


def input_names(model: Any) -> tuple[str, ...]:
    """Those of its forward's arguments that are inputs of the graph, in order."""
    names = inspect.signature(model.forward).parameters
    main = [name for name in (IDS, PIXELS, FEATURES) if name in names]
    wanted = {*main, *(OF_TOKENS if IDS in main else ())}
    return tuple(name for name in names if name in wanted)


def encoder_examples(
    model: Any, given: Examples, batch: int = BATCH, tokens: int = SEQ, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs of the sizes that the config names, or those given, by the forward's names.

    Raises InputError for a model whose inputs are others than token ids, images and log-mel
    features, if none are given.
    """
    if given is not None:
        return _named(model, given)
    generator = torch.Generator().manual_seed(seed)
    examples = {}
    for name in input_names(model):
        shape = _shape(model, name, batch, tokens)
        if name == IDS:
            rows = int(model.config.get_text_config().vocab_size)
            examples[name] = torch.randint(0, rows, shape, generator=generator)
        elif name in DEFAULTS:
            examples[name] = torch.full(shape, DEFAULTS[name])
        else:
            examples[name] = torch.randn(shape, generator=generator).to(_dtype(model))
    if not examples:
        main = getattr(model, "main_input_name", "something else")
        name = type(model).__name__
        raise InputError(f"{name} takes {main}, of no size that is known", _EXAMPLES)
    return examples


def _named(model: Any, given: Examples) -> dict[str, Tensor]:
    if isinstance(given, Mapping):
        return dict(given)
    parameters = inspect.signature(model.forward).parameters
    return dict(zip(parameters, given or (), strict=False))


def _shape(model: Any, name: str, batch: int, tokens: int) -> tuple[int, ...]:
    config = model.config
    if name == PIXELS:
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", None) or _SIZE
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return batch, int(getattr(config, "num_channels", 3)), int(height), int(width)
    if name == FEATURES:
        frames = 2 * int(getattr(config, "max_source_positions", 1500))
        return batch, int(getattr(config, "num_mel_bins", 80)), frames
    return batch, tokens


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


class _Found:
    """What is known once the model has run: its outputs' names, and their class's."""

    outputs: tuple[str, ...] = ()
    output_class: str = ""

    def __deepcopy__(self, memo: object) -> _Found:
        return self  # the copies of a module that are traced write to this one


class EncoderStep(nn.Module):
    """The model with its inputs in a row, and those of its outputs that are tensors."""

    def __init__(self, model: Any, names: Sequence[str], found: _Found) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.found = found

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        for name in OF_TOKENS:
            if name in given and IDS in given:  # no symbols of its own
                for axis in range(2):
                    torch._check(given[name].shape[axis] == given[IDS].shape[axis])
        output = self.model(**given)
        fields = tensor_fields(output)
        self.found.outputs, self.found.output_class = tuple(fields), type(output).__name__
        if not fields:
            raise TraceError(
                f"{type(self.model).__name__} returns a {type(output).__name__} without tensors",
                "compile the part of the model that returns tensors",
            )
        return tuple(fields.values())


def tensor_fields(output: Any) -> dict[str, Tensor]:
    """The tensors that a transformers output holds itself, by their names in it."""
    return {name: x for name, x in output.items() if isinstance(x, Tensor)}


def trace_encoder(model: Any, given: Examples = None) -> tuple[fx.GraphModule, Interface]:
    """Trace a transformers model that has no cache; its weights are shared, not copied.

    `given` are example inputs, for a model whose config does not say their sizes. Raises
    TraceError, naming the module at fault, if it cannot be exported.
    """
    parameters = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in parameters:
        raise encoder_decoder(model)
    skeleton: Any = skeleton_of(model)
    check_experts(skeleton)
    reset_rotary_frequencies(skeleton)
    keep_rotary_frequencies(skeleton)
    let_return_no_cache(skeleton)
    try:
        skeleton.set_attn_implementation("sdpa")
    except ValueError:
        skeleton.set_attn_implementation("eager")
    mode = fake_mode_of(model)
    examples = encoder_examples(model, given)
    if mode is not None:
        examples = {name: mode.from_tensor(x) for name, x in examples.items()}
    found = _Found()
    step = EncoderStep(skeleton, tuple(examples), found)
    gm, interface = trace_module(step, tuple(examples.values()), tuple(examples))
    rows, limit = _looked_up(gm)
    return gm, interface.model_copy(
        update={
            "kind": "encoder",
            "outputs": found.outputs,
            "output_class": found.output_class,
            "vocab_size": rows,
            "max_positions": limit,
            "max_positions_reason": "its table of learned positions ends there" if limit else "",
        }
    )


def let_return_no_cache(skeleton: Any) -> None:
    """Let the configs of a copied model ask for an output with names and for no cache."""
    for module in skeleton.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config.use_cache, config.return_dict = False, True


def _looked_up(gm: fx.GraphModule) -> tuple[int | None, int | None]:
    """The rows of the table that token ids look up, and of that of learned positions.

    A table with a padding index, as RoBERTa's, counts positions from the row behind it. Those of an
    image's patches are as many as its size says.
    """
    tokens: list[int] = []
    positions: list[int] = []
    for node in gm.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default:
            continue
        given = arguments(node)
        rows = int(given["weight"].meta["val"].shape[0])
        owner = str(given["weight"].target).split(".")[-2:][0]
        if given["indices"].target == IDS:
            tokens.append(rows)
        elif owner in _POSITIONS and isinstance(node.meta["val"].shape[-2], torch.SymInt):
            positions.append(rows - 1 - given["padding_idx"])
    return min(tokens, default=None), min(positions, default=None)


_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
