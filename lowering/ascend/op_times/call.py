"""A call of one of CANN's ops as sizes, dtypes and attributes, and its price by terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, fx

from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.target import Cost

OperandShape = tuple[int, ...]
SIZES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
    "complex64": 8,  # rotary embeddings of DeepSeek and Llama 4
}
"""Bytes of an element, by dtype."""


@dataclass(frozen=True)
class VendorCall:
    """A call: `shapes` and `dtypes` of its operands in the op's order; None: not given."""

    op: str
    shapes: tuple[OperandShape | None, ...]
    dtypes: tuple[str | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def has(self, index: int) -> bool:
        """Whether the operand is given."""
        return index < len(self.shapes) and self.shapes[index] is not None

    def shape(self, index: int) -> OperandShape:
        """The sizes of an operand. Raises ValueError, naming its place, if it is not given."""
        if not self.has(index):
            raise ValueError(f"operand {index + 1} of {self.op} is missing")
        found = self.shapes[index]
        assert found is not None
        return found

    def size(self, index: int) -> int:
        """Bytes of an element of an operand. Raises ValueError for a dtype without a size."""
        name = self.dtypes[index] if index < len(self.dtypes) else None
        if name is None or name not in SIZES:
            raise ValueError(f"operand {index + 1} of {self.op} has no known dtype: {name!r}")
        return SIZES[name]

    def elements(self, index: int) -> int:
        """How many elements an operand has; 0 where it is not given."""
        return prod(self.shape(index)) if self.has(index) else 0

    def bytes(self, index: int) -> int:
        """Bytes of an operand; 0 where it is not given."""
        return self.elements(index) * self.size(index) if self.has(index) else 0


SizesOf = Callable[[Tensor], Sequence[int]]
"""The sizes of a fake tensor, once a graph's open ones are known."""


def value_of(operand: Any) -> Tensor | None:
    """The fake tensor that a node stands for; None where no node is given."""
    return operand.meta["val"] if isinstance(operand, fx.Node) else None


Constants = Mapping[str, float]
Price = Callable[[VendorCall, AscendMachine, Constants], Cost]


@dataclass(frozen=True)
class OpModel:
    """What an op costs. `first` are its constants by name with the values that a fit starts from
    and stays near where no timing says more; `meaning` says what each is, with its unit."""

    price: Price
    first: Mapping[str, float]
    meaning: Mapping[str, str]


def combined(
    serial: Mapping[str, float],
    overlapped: Mapping[str, float] = {},
    exposed: float = 0.0,
    how: str = "",
) -> Cost:
    """The serial terms and the largest of the overlapped; of the others, the share `exposed` is
    not hidden behind it and is a serial term of its own."""
    serial = dict(serial)
    values: Sequence[float] = sorted(overlapped.values())
    if exposed and len(values) > 1:
        serial["exposed"] = exposed * sum(values[:-1])
    total = sum(serial.values()) + (values[-1] if values else 0.0)
    return Cost(total, {**serial, **overlapped}, how, tuple(overlapped))
