"""Arguments of graph nodes as plain data, and back.

    another node's value   {"node": 7}         its place in the list of nodes
    list, tuple            [1, 2]              {"tuple": [1, 2]}
    inf, -inf, nan         {"float": "-inf"}
    dtype, device          {"dtype": "int8"}   {"device": "cpu"}
    layout, memory format  {"layout": "strided"}   {"memory_format": "contiguous_format"}

None, bool, int, float and str stand for themselves. There is nothing else, in either direction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from panguq.errors import StorageError
from panguq.ir.text.value_types import DTYPES

_CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": dict(DTYPES),
    "layout": {"strided": torch.strided},
    "memory_format": {
        str(memory_format).removeprefix("torch."): memory_format
        for memory_format in (
            torch.contiguous_format,
            torch.preserve_format,
            torch.channels_last,
            torch.channels_last_3d,
        )
    },
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
}
_NAMES = {
    value: {kind: name}
    for kind in ("dtype", "layout", "memory_format")
    for name, value in _CONSTANTS[kind].items()
}
_DEEPEST = 8
_INT64 = range(-(2**63), 2**63)
_DEVICE = re.compile(r"(cpu|cuda|npu|xpu|meta)(:[0-9]{1,3})?")


def encode(value: Any, positions: Mapping[fx.Node, int], where: str) -> Any:
    """`value` as plain data; StorageError, starting with `where`, if it is not representable."""
    if isinstance(value, fx.Node):
        return {"node": positions[value]}
    if isinstance(value, list):
        return [encode(item, positions, where) for item in value]
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        return {"tuple": [encode(item, positions, where) for item in value]}
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) and value in _NAMES:
        return dict(_NAMES[value])
    raise StorageError(
        f"{where}: cannot save an argument of type {type(value).__name__}",
        "graphs hold node references, numbers, strings, lists, tuples, dtypes and devices",
    )


def decode(value: Any, earlier: Sequence[fx.Node], where: str, depth: int = 0) -> Any:
    """The argument that `encode` wrote; `earlier` are the nodes that it may refer to."""
    if depth > _DEEPEST:
        raise StorageError(f"{where}: nested deeper than {_DEEPEST}", DAMAGED)
    if isinstance(value, list):
        return [decode(v, earlier, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if value in _INT64:
            return value
        raise StorageError(f"{where}: an integer beyond 64 bits", DAMAGED)
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise StorageError(f"{where}: {value} is written as a number", DAMAGED)
    if not isinstance(value, dict) or len(value) != 1:
        raise StorageError(f"{where}: not an argument: {str(value)[:60]}", DAMAGED)
    ((kind, content),) = value.items()
    if kind == "tuple" and isinstance(content, list):
        return tuple(decode(content, earlier, where, depth + 1))
    if kind == "node":
        return _decode_node(content, earlier, where)
    if kind == "device":
        return _decode_device(content, where)
    if isinstance(content, str) and content in _CONSTANTS.get(kind, ()):
        return _CONSTANTS[kind][content]
    raise StorageError(f"{where}: unknown {kind!r}: {str(content)[:60]!r}", DAMAGED)


DAMAGED = "the graph file is damaged or was not written by this version of panguq"


def _decode_node(index: Any, earlier: Sequence[fx.Node], where: str) -> fx.Node:
    if type(index) is not int or not 0 <= index < len(earlier):
        raise StorageError(
            f"{where}: refers to node {str(index)[:40]}, which is not one of the {len(earlier)} "
            "nodes before it",
            DAMAGED,
        )
    return earlier[index]


def _decode_device(name: Any, where: str) -> torch.device:
    if not isinstance(name, str) or not _DEVICE.fullmatch(name):
        raise StorageError(f"{where}: unknown device {str(name)[:40]!r}", DAMAGED)
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise StorageError(
            f"{where}: this torch has no device {name!r}",
            "import the package that brings it (torch_npu for npu), or compile for this machine",
        ) from error
