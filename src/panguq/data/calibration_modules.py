"""Calibration inputs of modules that are no language models."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from panguq.data.calibration_rows import items_of
from panguq.data.inputs import check_module_inputs
from panguq.errors import InputError
from panguq.ir.interface import Interface

logger = logging.getLogger("panguq")

MOST_ITEMS = 1 << 12


def module_batches(
    data: Any, interface: Interface, examples: Sequence[Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """Graph inputs from inputs of any module.

    `data` is an iterable, such as a list or a DataLoader, of single tensors, tuples of tensors, or
    mappings from the inputs' names; one tensor or one mapping is one input. `examples` are the
    inputs that the module was traced with, whose dtypes all must have. Of data without a length at
    most 4096 inputs are taken, with a warning.

    Raises InputError, naming the item, for another number, shape or dtype of tensors.
    """
    takes = f"the module takes {len(interface.inputs)}: {', '.join(interface.inputs)}"
    batches: list[dict[str, Tensor]] = []
    for where, item in items(data):
        if len(batches) >= MOST_ITEMS and not isinstance(data, Sequence):
            logger.warning("calibration data: the first %d inputs are taken", MOST_ITEMS)
            break
        tensors = _tensors(item, interface, where)
        if len(tensors) != len(interface.inputs):
            raise InputError(
                f"{where} has {len(tensors)} tensors, {takes}", "leave out labels and the like"
            )
        _check(tensors, interface, examples, where)
        batches.append(dict(zip(interface.inputs, tensors, strict=True)))
    if not batches:
        raise InputError("the calibration data is empty", f"give at least one input; {takes}")
    return batches


def items(data: Any) -> Iterable[tuple[str, Any]]:
    """Every item with a name that says where it stands. Raises InputError for what has none."""
    if isinstance(data, str | bytes):
        raise InputError(
            f"calibration data is a {type(data).__name__}", "give an iterable of the inputs"
        )
    if isinstance(data, Tensor | Mapping):
        return iter([("calibration item 0", data)])
    return items_of(data)


def _tensors(item: Any, interface: Interface, where: str) -> tuple[Tensor, ...]:
    if isinstance(item, Mapping):
        missing = [name for name in interface.inputs if name not in item]
        if missing:
            raise InputError(
                f"{where} has no {', '.join(missing)}, but {', '.join(map(str, item))}",
                f"the inputs are {', '.join(interface.inputs)}",
            )
        item = tuple(item[name] for name in interface.inputs)
    values = tuple(item) if isinstance(item, list | tuple) else (item,)
    return tuple(_tensor(value, where) for value in values)


def _tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "__array__"):
        return torch.as_tensor(value)
    raise InputError(f"{where} holds a {type(value).__name__}, not a tensor", "give tensors")


def _check(
    tensors: tuple[Tensor, ...],
    interface: Interface,
    examples: Sequence[Tensor] | None,
    where: str,
) -> None:
    try:
        check_module_inputs(interface, tensors)
    except InputError as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise InputError(f"{where}, of shape {shapes}: {error.message}", error.hint) from None
    for name, tensor, example in zip(interface.inputs, tensors, examples or (), strict=False):
        if tensor.dtype != example.dtype:
            raise InputError(
                f"{where}: input {name} is {tensor.dtype}, the example input {example.dtype}",
                f"convert it: x.to({example.dtype})",
            )
