"""Refuses a config.json that asks for a model larger than any, before something is made of it.

A configuration's class may already make a list with an entry for each layer, so the numbers are
looked at where they stand in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from panguq.errors import StorageError
from panguq.files import limits

# The first that a key contains says what it counts.
_COUNTS = (
    (re.compile(r"theta|base|token_id|_id$|_ids$|seed|scale|factor|version|time_step"), None),
    (re.compile(r"layers$|n_layer|num_blocks|depth"), limits.LAYERS),
    (re.compile(r"vocab"), limits.VOCABULARY),
    (re.compile(r"position|window|length|chunk|context|n_ctx|seq"), limits.POSITIONS),
    (re.compile(r"experts?$|num_experts|moe_num"), limits.EXPERTS),
)


def check_sizes(settings: Mapping[str, Any], path: Path) -> None:
    """Raises StorageError, naming the key, for a number beyond what any model has."""
    layers: float = 0
    experts: float = 0
    for key, value in _numbers(settings):
        name = key.rpartition(".")[2]
        largest = next((most for word, most in _COUNTS if word.search(name)), limits.WIDTH)
        if largest is not None and value > largest:
            raise StorageError(
                f"{path}: {key} is {value}; the largest taken is {largest}",
                "the file is damaged; download it again",
            )
        layers = max(layers, value if largest == limits.LAYERS else 0)
        experts = max(experts, value if largest == limits.EXPERTS else 0)
    if layers * experts > limits.EXPERTS_IN_ALL:
        raise StorageError(
            f"{path}: {layers} layers of {experts} experts; the most taken is "
            f"{limits.EXPERTS_IN_ALL} experts in all",
            "the file is damaged; download it again",
        )


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Every number in the settings, with the path of keys that leads to it."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
