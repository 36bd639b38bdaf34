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

from panguq.errors import PanguqError
from panguq.suggest import did_you_mean


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


class Float8E4M3(NumberFormat):
    """8-bit floats of 4 exponent and 3 mantissa bits, up to 448; the finite ones of E4M3 (OCP FP8).

    Its smallest normal number is 2^-6, and below that it counts in steps of 2^-9. There are no
    infinities: what is beyond 448 becomes 448, and only a NaN has the code of a NaN.
    """

    def __init__(self) -> None:
        super().__init__("float8_e4m3fn", 8, torch.float8_e4m3fn, -448.0, 448.0)

    def encode(self, values: Tensor) -> Tensor:
        """Rounds halves to even mantissas."""
        return values.clamp(self.smallest, self.largest).to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """(-1)^s 2^(e - 7) (1 + m / 8); for e = 0, (-1)^s 2^-6 m / 8."""
        return codes.to(torch.float32)


INT1, INT4, INT8 = Integer(1), Integer(4), Integer(8)
FLOAT8_E4M3 = Float8E4M3()

FORMATS: dict[str, NumberFormat] = {
    known.name: known for known in (*(Integer(bits) for bits in range(1, 9)), FLOAT8_E4M3)
}
"""All formats by name."""


def find_number_format(name: str) -> NumberFormat:
    """The format of this name. Raises PanguqError, with the nearest one, if there is none."""
    if name not in FORMATS:
        raise PanguqError(
            f"unknown number format {name!r}", did_you_mean(name, FORMATS, "number formats")
        )
    return FORMATS[name]
