"""What a graph file must be before its parts are used: format, names, weights, calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from panguq.errors import StorageError
from panguq.ir.ops.opset import name_of
from panguq.ir.plain_names import is_input_name, is_weight_name
from panguq.ir.text.plain_arguments import DAMAGED
from panguq.ir.text.value_types import type_text

_OF_ONE_ARGUMENT = ("operator.neg", "torch.sym_float", "torch.sym_not")
FORMAT = "panguq-graph"
VERSION = 1


def node_entries(data: Mapping[str, Any], source: str) -> list[Any]:
    """The list of nodes in a graph's data, after a look at format and version."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise StorageError(f"{source}: not a graph of panguq", "its format should be " + FORMAT)
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise StorageError(
            f"{source}: graph version {data.get('version')!s:.40}, but this panguq reads {VERSION}",
            "load it with the version of panguq that saved it, or compile the model again",
        )
    if not isinstance(data.get("nodes"), list) or set(data) != {"format", "version", "nodes"}:
        raise StorageError(f"{source}: it should hold format, version and a list of nodes", DAMAGED)
    return data["nodes"]


def check_arguments(
    op: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
) -> None:
    """Refuse arguments that the op's schema does not have, or misses."""
    if not isinstance(op, OpOverload):
        if kwargs:
            raise StorageError(f"{where}: {name_of(op)} takes no keyword arguments", DAMAGED)
        takes = 1 if name_of(op) in _OF_ONE_ARGUMENT else 2
        if len(args) != takes:  # fx writes such calls as `a + b`, and stumbles over another number
            raise StorageError(f"{where}: {name_of(op)} takes {takes} arguments", DAMAGED)
        return
    schema = op._schema.arguments
    positional = [a.name for a in schema if not a.kwarg_only]
    filled = {*positional[: len(args)], *kwargs}
    missing = [a.name for a in schema if not a.has_default_value() and a.name not in filled]
    unknown = set(kwargs) - {a.name for a in schema[len(args) :]}
    if len(args) > len(positional) or missing or unknown:
        problem = f"misses {', '.join(missing)}" if missing else "has arguments it cannot take"
        raise StorageError(f"{where}: {name_of(op)} {problem}", f"its schema is {op._schema}")


def check_input_name(name: str, where: str) -> None:
    """Refuse names of inputs that are more than a name in fx's source."""
    if not is_input_name(name):
        raise StorageError(f"{where}: {name[:80]!r} cannot name an input", "use a plain identifier")


def check_weight_name(name: str, where: str) -> None:
    """Refuse names that would reach something other than a weight, or break fx's source."""
    if not is_weight_name(name):
        raise StorageError(
            f"{where}: {name[:80]!r} cannot name a weight",
            "weights are named like modules: letters, digits, _ and -, joined by dots",
        )


def check_weight(name: str, tensors: Mapping[str, Tensor], expected: str, where: str) -> None:
    """Refuse a weight that is missing or of another type than the graph was saved with."""
    if name not in tensors:
        raise StorageError(f"{where}: there is no weight {name}", "the weights' file is another's")
    found = type_text(tensors[name], {})
    if found != expected:
        raise StorageError(
            f"{where}: weight {name} is {found}, but the graph wants {expected[:80] or 'no type'}",
            "graph and weights do not belong together",
        )
