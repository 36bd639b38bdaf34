"""How numbers are quantized: bits and granularity of a tensor, and the schemes of a matmul."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal

from panguq.errors import RecipeError

Granularity = Literal["per_tensor", "per_token", "per_channel", "per_group"]


@dataclass(frozen=True)
class QuantSpec:
    """Quantization of one tensor.

    `per_tensor` and `per_token` are for activations `[..., k]`, `per_channel` (one scale an
    output) and `per_group` (one scale per `group_size` inputs of an output) for weights `[n, k]`.
    `dynamic` computes the scale from the value itself at run time.
    """

    bits: int
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    group_size: int | None = None

    @property
    def quant_min(self) -> int:
        """The smallest code. Symmetric activations leave out -2^(bits-1), as the NPU does."""
        low = -(2 ** (self.bits - 1))
        return low + 1 if self.symmetric and self.granularity == "per_token" else low

    @property
    def quant_max(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def group_size_for(self, k: int) -> int:
        """Inputs per scale for a weight with k inputs.

        Where `group_size` does not divide k, the largest of 64 and 32 that does; k itself per
        channel. Raises ValueError if none of them divides k, and for 4-bit codes of odd k.
        """
        if self.bits == 4 and k % 2:
            raise ValueError(f"k = {k} is odd, and 4-bit codes are stored in pairs")
        if self.granularity != "per_group":
            return k
        assert self.group_size is not None
        for size in (self.group_size, 64, 32):
            if size <= self.group_size and k % size == 0:
                return size
        raise ValueError(f"none of the group sizes {self.group_size}, 64, 32 divides k = {k}")


@dataclass(frozen=True)
class Scheme:
    """How a matmul is quantized; None leaves that side in floating point."""

    name: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.weight is None


_PER_CHANNEL_8 = QuantSpec(8, "per_channel")
_PER_GROUP_4 = QuantSpec(4, "per_group", group_size=128)
_PER_TOKEN_8 = QuantSpec(8, "per_token", dynamic=True)
_PER_TOKEN_4 = QuantSpec(4, "per_token", dynamic=True)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("FLOAT"),
        Scheme("W8A8", _PER_CHANNEL_8, QuantSpec(8, "per_tensor", symmetric=False)),
        Scheme("W8A8_DYNAMIC", _PER_CHANNEL_8, _PER_TOKEN_8),
        Scheme("W8A16", _PER_CHANNEL_8),
        Scheme("W4A16", _PER_GROUP_4),
        Scheme("W4A16_ASYM", replace(_PER_GROUP_4, symmetric=False)),
        Scheme("W4A8", replace(_PER_GROUP_4, group_size=256), _PER_TOKEN_8),
        Scheme("W4A4", QuantSpec(4, "per_channel"), _PER_TOKEN_4),
    )
}


def parse_scheme(text: str) -> Scheme:
    """A scheme by name, with an optional group size: `W4A16`, `w4a16-g64`, `W4A16-PER_CHANNEL`.

    Raises RecipeError, with the nearest name, for anything else.
    """
    base, _, option = text.upper().partition("-")
    base = base.strip()
    if base not in SCHEMES:
        near = difflib.get_close_matches(base, SCHEMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"unknown scheme {text!r}", f"{hint}The schemes are {', '.join(SCHEMES)}")
    scheme = SCHEMES[base]
    if not option:
        return scheme
    weight = scheme.weight
    if weight is None or weight.granularity != "per_group":
        raise RecipeError(f"scheme {text!r} has no groups", f"write {base}")
    if option == "PER_CHANNEL":
        weight = replace(weight, granularity="per_channel", group_size=None)
    elif re.fullmatch(r"G(32|64|128|256)", option):
        weight = replace(weight, group_size=int(option[1:]))
    else:
        raise RecipeError(
            f"unknown option {option!r} of scheme {text!r}",
            "write -g32, -g64, -g128, -g256 or -per_channel",
        )
    return replace(scheme, name=f"{base}-{option.lower()}", weight=weight)
