"""The language model inside a model that sees or hears, too."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

TOLERANCE = 1e-4
"""Of the largest logit: the language model alone against the whole on a few tokens."""


def language_model_of(model: Any) -> Any:
    """The causal language model inside a vision-language wrapper of transformers', weights shared.

    It has the class that transformers has for text alone; a sentence in `panguq_left_out` says what
    else the wrapper has. Any other model is returned as it is, and so is a wrapper whose text has
    no such class (Qwen2-VL) or is not computed by it alone.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return model
    text = model.config.get_text_config()
    inner = getattr(getattr(model, "model", model), "language_model", None)
    head = model.get_output_embeddings()
    if text is model.config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or head is None:
        return model
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    kind = kinds[0] if isinstance(kinds, (list, tuple)) else kinds
    with torch.device("meta"):
        made = kind._from_config(copy.deepcopy(text))
    if type(getattr(made, kind.base_model_prefix, None)) is not type(inner):
        return model
    setattr(made, kind.base_model_prefix, inner)
    made.set_output_embeddings(head)
    _describe(made, model, head)
    if any(p.is_meta for p in (*made.parameters(), *made.buffers())) or not _alike(model, made):
        return model
    kept = {id(p) for p in made.parameters()}
    towers = [
        f"{path} ({type(module).__name__})"
        for path, module in getattr(model, "model", model).named_children()
        if (own := {id(p) for p in module.parameters()}) and not own & kept
    ]
    made.panguq_left_out = (
        f"of this {type(model).__name__} the language model alone is compiled, as a "
        f"{kind.__name__}; left out: {', '.join(towers) or 'nothing with weights'}",
    )
    return made.eval()


def _describe(made: Any, model: Any, head: nn.Module) -> None:
    """Give it the wrapper's name and generation settings, and say whether its head is tied."""
    made.config.architectures = [type(made).__name__]
    made.config.name_or_path = model.config.name_or_path
    made.config.tie_word_embeddings = head.weight is made.get_input_embeddings().weight
    made.generation_config = copy.deepcopy(model.generation_config)
    made.panguq_unused_weights = tuple(getattr(model, "panguq_unused_weights", ()))


def _alike(model: Any, made: Any) -> bool:
    """Whether both give the same logits for a few tokens; True where they have no weights."""
    from torch._subclasses.fake_tensor import FakeTensor

    if any(isinstance(p, FakeTensor) for p in made.parameters()):
        return True
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        whole, alone = (m.eval()(input_ids=ids, use_cache=False).logits for m in (model, made))
    return bool((whole - alone).abs().max() <= TOLERANCE * whole.abs().max())
