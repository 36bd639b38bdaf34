"""Which of transformers' classes a config.json stands for.

`architectures` names it. It is looked up in transformers' own modules for the config's model type
and nowhere else; no code of the folder's is run.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from panguq.errors import InputError

SERVED = (
    "panguq compiles causal language models, encoders and models with a head that transformers "
    "itself defines"
)


def config_classes() -> Any:
    """transformers' configuration class by model type, and those of openPangu's mixtures of
    experts, which transformers does not have."""
    from transformers import CONFIG_MAPPING

    from panguq.models.openpangu.mixture_models import register_openpangu_mixtures

    register_openpangu_mixtures()
    return CONFIG_MAPPING


def model_class(config: Any, place: object = "the model") -> tuple[Any, Any]:
    """The class, and the configuration that it takes: of a larger model perhaps the part for text.

    Without `architectures`, that of a causal language model if the type has one, else the plain
    model. Raises InputError, naming `place`, for a class that transformers does not have for this
    type, and for a model of two halves.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    given = list(getattr(config, "architectures", None) or ())
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    causal = _listed(mapping[type(config)]) if type(config) in mapping else []
    plain = _listed(MODEL_MAPPING[type(config)]) if type(config) in MODEL_MAPPING else []
    named = {kind.__name__: kind for kind in causal}
    kind = next((named[name] for name in given if name in named), None)
    if kind is None and given:
        kind = _defined(config, str(given[0]))
    elif kind is None:
        kind = next(iter([*causal, *plain]), None)
    if kind is None:
        what = ", ".join(map(str, given)) or f"model type {config.model_type}"
        raise InputError(f"{place}: transformers has no class for a {what}", SERVED)
    if _has_two_halves(kind, config):
        raise InputError(
            f"{place}: a {kind.__name__} is an encoder-decoder model",
            "panguq compiles its encoder alone, from Python: load it with transformers and give "
            "model.get_encoder()",
        )
    return kind, _part_for(kind, config)


def is_language_model(config: Any) -> bool:
    """Whether the class is one that continues text, or would if its attention were causal."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind, _ = model_class(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    return kind in _listed(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _listed(kinds: Any) -> list[Any]:
    return list(kinds) if isinstance(kinds, (list, tuple)) else [kinds]


def _defined(config: Any, name: str) -> Any:
    """The class of that name in transformers' module for the config's type, if it takes it."""
    from transformers import PreTrainedModel

    place = type(config).__module__
    if not place.startswith("transformers.models."):
        return None
    found = getattr(import_module(place.replace(".configuration_", ".modeling_")), name, None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    takes = {type(config), *type(config).sub_configs.values()}
    return found if is_model and getattr(found, "config_class", None) in takes else None


def _has_two_halves(kind: Any, config: Any) -> bool:
    if not getattr(config, "is_encoder_decoder", False):
        return False
    return "decoder_input_ids" in inspect.signature(kind.forward).parameters


def _part_for(kind: Any, config: Any) -> Any:
    """The part of the configuration that the class takes."""
    if kind.config_class is type(config):
        return config
    for name, part in type(config).sub_configs.items():
        if kind.config_class is part and name == "text_config":
            return config.get_text_config()
        if kind.config_class is part:
            return getattr(config, name)
    return config
