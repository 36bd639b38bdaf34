"""From what a user passes to an encoder to what its graph takes, and back to named outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

import torch
import transformers.modeling_outputs
from torch import Tensor, nn
from transformers.utils import ModelOutput

from panguq.data.inputs import check_ids, check_module_inputs, real_tokens
from panguq.errors import InputError
from panguq.ir.encoder import DEFAULTS, IDS, Examples, input_names, is_encoder, reads_text
from panguq.ir.interface import Interface


def named_inputs(
    interface: Interface, args: Sequence[Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The inputs of a call by name; what is None or False is left out.

    Raises InputError for what the graph does not take.
    """
    if len(args) > len(interface.inputs):
        raise InputError(
            f"{len(args)} inputs given in a row", f"the model takes {', '.join(interface.inputs)}"
        )
    found = {n: x for n, x in zip(interface.inputs, args, strict=False) if x is not None}
    doubled = sorted(found.keys() & given.keys())
    if doubled:
        raise InputError(f"{', '.join(doubled)} is given twice", "by place or by name, not both")
    found |= {name: x for name, x in given.items() if x is not None and x is not False}
    others = sorted(found.keys() - set(interface.inputs))
    if others:
        raise InputError(
            f"a compiled model does not take {', '.join(others)}",
            f"its graph takes {', '.join(interface.inputs)}",
        )
    return found


def prepare_encoder(interface: Interface, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The graph's inputs by name, those with a default filled in.

    `attention_mask` `[batch, seq]` is 1 where a token is real; images and the like may be floats of
    any width. Raises InputError for inputs that
    are missing, of other sizes than the graph serves, or no tensors.
    """
    inputs = dict(given)
    if IDS in inputs and IDS in interface.inputs:
        ids = inputs[IDS] = check_ids(interface, inputs[IDS])
        for name in DEFAULTS.keys() & set(interface.inputs):
            value = inputs.setdefault(name, torch.full_like(ids, DEFAULTS[name]))
            inputs[name] = value.long() if isinstance(value, Tensor) else value
        _check_length(interface, ids.shape[1])
        if "attention_mask" in inputs:
            real_tokens(inputs["attention_mask"], *ids.shape)
    missing = [name for name in interface.inputs if name not in inputs]
    if missing:
        raise InputError(
            f"{missing[0]} is missing", f"the model takes {', '.join(interface.inputs)}"
        )
    ordered = {name: _tensor(interface, name, inputs[name]) for name in interface.inputs}
    check_module_inputs(interface, tuple(ordered.values()))
    return ordered


def _tensor(interface: Interface, name: str, value: Any) -> Tensor:
    """The input as the graph takes it, floats in its dtype."""
    value = torch.as_tensor(value) if hasattr(value, "__array__") else value
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}", "give a tensor")
    return value.to(getattr(torch, interface.float_dtype)) if value.is_floating_point() else value


def _check_length(interface: Interface, tokens: int) -> None:
    most = interface.max_positions
    if most is not None and tokens > most:
        raise InputError(
            f"{tokens} tokens are more than the model's {most} positions "
            f"({interface.max_positions_reason})",
            "cut the text: tokenizer(text, truncation=True, max_length=...)",
        )


def named_output(
    kind: str, config: Any, names: Sequence[str], results: Sequence[Tensor]
) -> ModelOutput:
    """The results as an output of transformers' class `kind`; without such a class, as one that has
    these fields alone."""
    values = dict(zip(names, results, strict=True))
    for module in (transformers.modeling_outputs, _modeling_of(config)):
        found: Any = getattr(module, kind, None)
        is_output = isinstance(found, type) and issubclass(found, ModelOutput)
        if is_output and values.keys() <= {field.name for field in fields(found)}:
            return found(**values)
    return ModelOutput(**values)


def _modeling_of(config: Any) -> Any:
    """transformers' module of the config's model; None for a config of another kind."""
    place = type(config).__module__
    if not place.startswith("transformers.models."):
        return None
    return import_module(place.replace(".configuration_", ".modeling_"))


def lacks_data(model: nn.Module, example_inputs: Examples) -> bool:
    """Whether nothing can stand for calibration data that is not given."""
    return is_encoder(model) and example_inputs is None


def needs_data(model: nn.Module) -> InputError:
    """The error where a recipe observes data, none is given, and the model cannot write any."""
    text = "--calibration FILE, or from Python texts with a tokenizer, or token ids"
    names = " and ".join(input_names(model)) or "its inputs"
    return InputError(
        f"the recipe calibrates on data, and {type(model).__name__} writes none of its own",
        f"give {text}"
        if reads_text(model)
        else f"compile it from Python with calibration=, a list of mappings with {names}",
    )
