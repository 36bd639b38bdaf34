"""Number formats: the values that a code can stand for, before scales and zero points.

A format is what a `QuantSpec` holds and all that is asked of it: how many bits a stored code has,
where its grid ends, the codes of values and the values of codes. Graphs and files name formats by
what `FORMATS` calls them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NumberFormat(ABC):
    """A grid of numbers and their codes.

    name: what graphs and files call it.
    bits: of a stored code. Below 8, codes are int8 in [-2^(bits-1), 2^(bits-1)), so that they are
        packed as integers of so many bits are; codes of 8 bits are stored as they are.
    storage: the dtype of a tensor of codes.
    smallest, largest: the ends of the grid, onto which scales map a tensor's range.
    """

    name: str
    bits: int
    storage: torch.dtype
    smallest: float
    largest: float

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """The codes of the grid's values nearest to `values`, which are float and of any shape.

        What lies beyond an end of the grid, infinities too, gets the end's code. A NaN gives an
        unspecified code.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes, float32."""

    def __str__(self) -> str:
        return self.name


class Integer(NumberFormat):
    """Two's complement integers of 1 to 8 bits. They alone may have zero points."""

    def __init__(self, bits: int) -> None:
        super().__init__(f"int{bits}", bits, torch.int8, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def encode(self, values: Tensor) -> Tensor:
        """Rounds halves to even."""
        return values.round().clamp_(self.smallest, self.largest).to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """The codes themselves."""
        return codes.to(torch.float32)


INT1, INT4, INT8 = Integer(1), Integer(4), Integer(8)

FORMATS: dict[str, NumberFormat] = {
    known.name: known for known in (Integer(bits) for bits in range(1, 9))
}
"""All formats by name."""
