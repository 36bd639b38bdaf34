"""What a compressed-tensors config says of a linear: the group it is in, or that it is left out.

Anything that the config does not hold in the form of a group is another rule's to find.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from panguq.check.files import CheckedFolder


@dataclass(frozen=True)
class ConfigGroup:
    """An entry of config_groups: how the weights and inputs of its targets are quantized."""

    name: str
    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    activation: dict[str, Any] | None
    own_format: str
    format: str

    @property
    def inferred_format(self) -> str:
        """What compressed-tensors takes where the group says nothing."""
        return "int-quantized" if self.activation else "pack-quantized"

    @property
    def is_static(self) -> bool:
        """Whether inputs are quantized with stored scales."""
        return self.activation is not None and not self.activation.get("dynamic", False)

    def scales(self, k: int) -> int:
        """Scales of each output."""
        return k // self.group_size if self.strategy == "group" and self.group_size else 1


def groups(folder: CheckedFolder) -> list[ConfigGroup]:
    """The groups that can be read; what cannot be is another rule's."""
    config = folder.quantization_config or {}
    listed = config.get("config_groups")
    top = str(config.get("format", ""))
    found = []
    for name, entry in (listed if isinstance(listed, dict) else {}).items():
        if not _is_readable(entry):
            continue
        weights, activation = entry["weights"], entry.get("input_activations")
        own = str(entry.get("format") or "")
        found.append(
            ConfigGroup(
                name=str(name),
                targets=tuple(str(target) for target in entry.get("targets") or ()),
                bits=int(weights.get("num_bits") or 0),
                symmetric=bool(weights.get("symmetric", True)),
                strategy=str(weights.get("strategy") or "tensor"),
                group_size=int(weights.get("group_size") or 0),
                activation=activation if isinstance(activation, dict) else None,
                own_format=own,
                format=own or top,
            )
        )
    return found


def _is_readable(entry: object) -> bool:
    """Whether an entry of config_groups has the form of one."""
    if not isinstance(entry, dict) or not isinstance(entry.get("weights"), dict):
        return False
    numbers = (entry["weights"].get(key) for key in ("num_bits", "group_size"))
    targets = entry.get("targets")
    return all(n is None or isinstance(n, int) for n in numbers) and (
        targets is None or isinstance(targets, list)
    )


def linears_of(folder: CheckedFolder) -> dict[str, tuple[int, int] | None]:
    """Every linear: of the architecture with its (n, k), else those that are stored."""
    if folder.model is not None:
        return dict(folder.model.linears)
    leaves = (".weight_packed", ".weight")
    stored = [(n, leaf) for n in folder.tensors for leaf in leaves if n.endswith(leaf)]
    return {n.removesuffix(leaf): None for n, leaf in stored if len(folder.tensors[n].shape) == 2}


def config_group_of(folder: CheckedFolder, path: str) -> ConfigGroup | None:
    """The group whose targets name this linear, by name before pattern before class."""
    found = groups(folder)
    for how in (_is_named, _is_matched, _is_class):
        for group in found:
            if any(how(path, target) for target in group.targets):
                return group
    return None


def is_ignored(folder: CheckedFolder, path: str) -> bool:
    """Whether the config leaves this linear out."""
    found = (folder.quantization_config or {}).get("ignore")
    listed = found if isinstance(found, list) else ()
    return any(_is_named(path, str(t)) or _is_matched(path, str(t)) for t in listed)


def quantized(folder: CheckedFolder) -> Iterator[tuple[str, ConfigGroup, tuple[int, int] | None]]:
    """(path, group, (n, k)) of each linear that is to be quantized."""
    for path, shape in linears_of(folder).items():
        group = config_group_of(folder, path)
        if group is not None and not is_ignored(folder, path):
            yield path, group, shape


def _is_named(path: str, target: str) -> bool:
    return path == target


def _is_matched(path: str, target: str) -> bool:
    if not target.startswith("re:"):
        return False
    try:
        return re.match(target[3:], path) is not None
    except re.error:
        return False


def _is_class(path: str, target: str) -> bool:
    return target.lower() == "linear"
