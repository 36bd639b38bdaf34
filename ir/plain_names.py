"""Names that inputs and weights may have in a graph, whose source fx writes as Python."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection

import torch
from torch import fx

_INPUT = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_WEIGHT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_MODULE_ATTRIBUTES = frozenset(dir(torch.nn.Module()))
_GRAPH_ATTRIBUTES = frozenset({*dir(fx.GraphModule), "meta", "graph"})


def is_input_name(name: str) -> bool:
    """Whether an input may be called so."""
    return bool(_INPUT.fullmatch(name)) and not keyword.iskeyword(name) and name != "self"


def is_weight_name(name: str) -> bool:
    """Whether a weight may be called so: like modules, and not as a graph's own attributes."""
    parts = name.split(".")
    taken = _MODULE_ATTRIBUTES.intersection(parts) or _GRAPH_ATTRIBUTES.intersection(parts[:1])
    dunder = any(part.startswith("__") for part in parts)
    return bool(_WEIGHT.fullmatch(name)) and not taken and not dunder


def weight_name(name: str, taken: Collection[str]) -> str:
    """The name itself if a weight may be called so; one like it, not among `taken`, if not."""
    if is_weight_name(name):
        return name
    parts = [re.sub(r"[^A-Za-z0-9_-]", "_", part).strip("_") for part in name.split(".")]
    plain = ".".join(f"{part or 'weight'}_" for part in parts)
    while plain in taken:
        plain += "_"
    return plain
