"""How numbers are quantized: format and granularity of a tensor, and the schemes of a matmul."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal

from panguq.errors import RecipeError
from panguq.ir.number_format import FLOAT8_E4M3, INT4, INT8, Integer, NumberFormat

Granularity = Literal["per_tensor", "per_token", "per_channel", "per_group"]


@dataclass(frozen=True)
class QuantSpec:
    """Quantization of one tensor.

    `per_tensor` and `per_token` are for activations `[..., k]`, `per_channel` (one scale an
    output) and `per_group` (one scale per `group_size` inputs of an output) for weights `[n, k]`.
    `dynamic` computes the scale from the value itself at run time.
    """

    format: NumberFormat
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    group_size: int | None = None

    def __post_init__(self) -> None:
        static = self.granularity == "per_tensor" and not self.dynamic
        if not self.is_integer and (not self.symmetric or static):
            raise ValueError(f"{self.format}: integers alone have zero points and static scales")

    @property
    def bits(self) -> int:
        """Of a stored code."""
        return self.format.bits

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers, which count steps of the scale."""
        return isinstance(self.format, Integer)

    @property
    def quant_min(self) -> int:
        """The smallest integer code. Symmetric activations leave out -2^(bits-1), as the NPU does.

        Raises TypeError for a format of other numbers.
        """
        low = int(self._integer.smallest)
        return low + 1 if self.symmetric and self.granularity == "per_token" else low

    @property
    def quant_max(self) -> int:
        """The largest integer code. Raises TypeError for a format of other numbers."""
        return int(self._integer.largest)

    @property
    def _integer(self) -> Integer:
        if isinstance(self.format, Integer):
            return self.format
        raise TypeError(f"the codes of {self.format} are no integers")

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

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The formats of the weight's codes and of the activation's, as far as there are codes."""
        return tuple(spec.format for spec in (self.weight, self.activation) if spec is not None)


_PER_CHANNEL_8 = QuantSpec(INT8, "per_channel")
_PER_CHANNEL_FP8 = QuantSpec(FLOAT8_E4M3, "per_channel")
_PER_GROUP_4 = QuantSpec(INT4, "per_group", group_size=128)
_PER_TENSOR_8 = QuantSpec(INT8, "per_tensor", symmetric=False)
_PER_TOKEN_8 = QuantSpec(INT8, "per_token", dynamic=True)
_PER_TOKEN_6 = replace(_PER_TOKEN_8, format=Integer(6))
_PER_TOKEN_4 = replace(_PER_TOKEN_8, format=INT4)
_PER_GROUP_ASYM = replace(_PER_GROUP_4, symmetric=False)

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("FLOAT"),
        Scheme("W8A8", _PER_CHANNEL_8, _PER_TENSOR_8),
        Scheme("W8A8_DYNAMIC", _PER_CHANNEL_8, _PER_TOKEN_8),
        Scheme("W8A8_FP8", _PER_CHANNEL_FP8, replace(_PER_TOKEN_8, format=FLOAT8_E4M3)),
        Scheme("W8A16", _PER_CHANNEL_8),
        Scheme("W6A16", replace(_PER_GROUP_4, format=Integer(6))),
        Scheme("W6A6", QuantSpec(Integer(6), "per_channel"), _PER_TOKEN_6),
        Scheme("W4A16", _PER_GROUP_4),
        Scheme("W4A16_ASYM", _PER_GROUP_ASYM),
        Scheme("W4A8", replace(_PER_GROUP_4, group_size=256), _PER_TOKEN_8),
        Scheme("W4A8_STATIC", replace(_PER_GROUP_4, group_size=256), _PER_TENSOR_8),
        Scheme("W4A4", QuantSpec(INT4, "per_channel"), _PER_TOKEN_4),
        # With few codes a zero point is worth its bits: a symmetric 2-bit grid wastes one of four.
        Scheme("W3A16", replace(_PER_GROUP_ASYM, format=Integer(3))),
        Scheme("W2A16", replace(_PER_GROUP_ASYM, format=Integer(2))),
        Scheme("W1A16", replace(_PER_GROUP_ASYM, format=Integer(1))),
    )
}


def parse_scheme(text: str) -> Scheme:
    """A scheme by name, with options for its weights: `W4A16`, `w4a16-g64`, `W3A16-sym-g64`.

    Options: a group size -g32, -g64, -g128, -g256 or -per_channel; for weight-only schemes below 8
    bits also -sym or -asym. Raises RecipeError, with the nearest name, for anything else.
    """
    base, *options = text.upper().split("-")
    base = base.strip()
    if base not in SCHEMES:
        _refuse_microscaling(text, base)
        near = difflib.get_close_matches(base, SCHEMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(
            f"unknown scheme {text!r:.80}", f"{hint}The schemes are {', '.join(SCHEMES)}"
        )
    for option in [o for o in options if o in _SYMMETRY]:
        base = _with_symmetry(text, base, option)
        options.remove(option)
    scheme = SCHEMES.get(base) or _sibling(base)
    weight = scheme.weight
    for option in options:
        weight = _with_groups(text, scheme, weight, option)
    if weight == scheme.weight:
        return scheme
    return replace(scheme, name="-".join([scheme.name, *(o.lower() for o in options)]),
                   weight=weight)  # fmt: skip


def _refuse_microscaling(text: str, base: str) -> None:
    """Raises RecipeError for an MX format, which has a power of two as the scale of 32 numbers."""
    found = re.fullmatch(r"(W[468]A(?:[468]|16)[-_]?)?MX_?(FP|INT)([468])(_?E\dM\d)?", base)
    if found is None:
        return
    name = f"MX{found[2]}{found[3]}"
    instead = "W8A8_DYNAMIC" if found[3] == "8" else "W4A8 or W4A16"
    raise RecipeError(
        f"scheme {text!r:.80}: panguq has no kernel of {name}, on no target",
        f"choose {instead} instead; Ascend 950 multiplies microscaling formats, Atlas A2 does not",
    )


_SYMMETRY = ("SYM", "ASYM")


def _sibling(base: str) -> Scheme:
    """`W3A16_SYM` and the like: a scheme whose weights have the other kind of codes."""
    stem, _, kind = base.rpartition("_")
    scheme = SCHEMES[stem]
    assert scheme.weight is not None
    weight = replace(scheme.weight, symmetric=kind == "SYM")
    return Scheme(f"{stem}-{kind.lower()}", weight, scheme.activation)


def _with_symmetry(text: str, base: str, option: str) -> str:
    scheme = SCHEMES[base]
    weight = scheme.weight
    takes = weight is not None and weight.is_integer and weight.bits < 8
    if weight is None or not takes or scheme.activation is not None:
        raise RecipeError(
            f"option {option.lower()!r} of scheme {text!r}: only weight-only schemes below 8 bits "
            "have it",
            f"write {base}",
        )
    if weight.bits == 1 and option == "SYM":
        raise RecipeError(
            f"scheme {text!r}: one bit around zero has one level, which is zero", f"write {base}"
        )
    stem = base.removesuffix("_ASYM")
    if SCHEMES[stem].weight == replace(weight, symmetric=option == "SYM"):
        return stem
    return f"{stem}_{option}"


def _with_groups(text: str, scheme: Scheme, weight: QuantSpec | None, option: str) -> QuantSpec:
    grouped = re.fullmatch(r"G(32|64|128|256)", option)
    if grouped is None and option != "PER_CHANNEL":
        raise RecipeError(
            f"unknown option {option!r} of scheme {text!r}",
            "write -g32, -g64, -g128, -g256 or -per_channel, and -sym or -asym",
        )
    if weight is None or weight.granularity != "per_group":
        raise RecipeError(f"scheme {text!r} has no groups", f"write {scheme.name}")
    if grouped is None:
        return replace(weight, granularity="per_channel", group_size=None)
    return replace(weight, group_size=int(grouped[1]))
