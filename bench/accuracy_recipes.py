"""Which recipes the accuracy table compares."""

from __future__ import annotations

from typing import Any

from panguq.recipe import RecipeLike, preset_names

_BLOCKS = ["awq", "weigh-tokens", "insert-fake-quant"]
_TUNED = {"tune-scales": {"epochs": 4, "learning_rate": 0.005}}

# Not built in: rows that nobody should use, what the methods are compared with, and `-blocks`,
# which a whole model is still to be measured with.
BASELINES: dict[str, dict[str, Any]] = {
    "w4a16-blocks": {
        "schemes": {"*": "W4A16-g64-asym"},
        "passes": [*_BLOCKS, "progressive-rounding", "tune-scales"],
    },
    "w3a16-blocks": {
        "schemes": {"*": "W3A16-g64"},
        "passes": [*_BLOCKS, "progressive-rounding", _TUNED],
    },
    "w2a16-blocks": {
        "schemes": {"*": "W2A16-g64"},
        "passes": [*_BLOCKS, {"progressive-rounding": {"scale_rate": 0.005}}, _TUNED],
    },
    "w1-rtn": {
        "schemes": {"*": "W1A16"},
        "passes": ["insert-fake-quant", "quantize-weights"],
    },
    "w1-gptq": {"schemes": {"*": "W1A16"}, "passes": ["insert-fake-quant", "gptq"]},
    "w4a16-plain-gptq": {"schemes": {"*": "W4A16"}, "passes": ["insert-fake-quant", "gptq"]},
    "w4a8-plain-gptq": {"schemes": {"*": "W4A8"}, "passes": ["insert-fake-quant", "gptq"]},
    "w4a8-plain-gptaq": {"schemes": {"*": "W4A8"}, "passes": ["insert-fake-quant", "gptaq"]},
    "w4a16-plain-rtn": {
        "schemes": {"*": "W4A16"},
        "passes": ["insert-fake-quant", "quantize-weights"],
    },
    "w4a4": {"schemes": {"*": "W4A4"}, "passes": ["insert-fake-quant", "quantize-weights"]},
    "w4a4-smoothquant": {
        "schemes": {"*": "W4A4"},
        "passes": [{"smoothquant": {"alpha": 0.5}}, "insert-fake-quant", "quantize-weights"],
    },
}
DEFAULT = (
    "float", "w8a8", "w8a8-smooth", "w8a8-tuned", "w8a8-dynamic", "w8a8-dynamic-tuned",
    "w8a8-dynamic-kv8", "w8a16", "w6a16",
    "w4a16-plain-rtn", "w4a16", "w4a16-asym", "w4a16-awq", "w4a16-plain-gptq", "w4a16-gptaq",
    "w4a16-gptq", "w4a16-rounding", "w4a16-tuned", "mixed-4.75",
    "w3a16", "w3a16-gptq", "w3a16-awq", "w3a16-tuned",
    "w2a16", "w2a16-gptq", "w2a16-slim-llm",
    "w1-rtn", "w1-gptq", "w1-billm",
    "w4a8", "w4a8-plain-gptq", "w4a8-plain-gptaq", "w4a8-gptq", "w4a8-tuned",
    "w4a4", "w4a4-smoothquant", "w4a4-rotate", "w4a4-flat",
)  # fmt: skip


def known(name: str) -> bool:
    """Whether there is such a recipe here: built in, a baseline, or a YAML file."""
    return name in BASELINES or name in preset_names() or name.endswith((".yaml", ".yml"))


def recipe_of(name: str) -> RecipeLike:
    """What `panguq.compile` takes for a name of the table."""
    return {"name": name, **BASELINES[name]} if name in BASELINES else name
