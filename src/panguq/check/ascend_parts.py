"""Which tensors a quantized linear of each AscendV1 type has, in which dtypes and shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from panguq.formats.checkpoint.ascend_v1_tensors import loader_split
from panguq.kernels.ascend.limits import W4A8_GROUP

FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Part:
    """A tensor of a quantized linear: its dtypes and shapes for a weight of [n, k]."""

    dtypes: tuple[str, ...]
    shapes: Callable[[int, int], list[tuple[int, ...]]]
    required: bool = True


def _weight(n: int, k: int) -> list[tuple[int, ...]]:
    return [(n, k)]


def _column(n: int, k: int) -> list[tuple[int, ...]]:
    return [(n, 1)]


def _row(n: int, k: int) -> list[tuple[int, ...]]:
    return [(n,)]


def _one(n: int, k: int) -> list[tuple[int, ...]]:
    return [(1,)]


def _factor(k: int, side: int) -> list[tuple[int, ...]]:
    """The shape of a Kronecker factor, as the loader splits k."""
    split = loader_split(k)
    return [] if split is None else [(split[side], split[side])]


_CODES = {"weight": Part(("I8",), _weight)}
_PER_CHANNEL = {
    "weight_scale": Part(FLOATS, _column),
    "weight_offset": Part((*FLOATS, "I8", "I32", "I64"), _column),
}
_STATIC = {
    "input_scale": Part(FLOATS, _one),
    "input_offset": Part((*FLOATS, "I8", "I32"), _one),
    "deq_scale": Part(("F32", "I64"), _row),
    "quant_bias": Part(("I32",), _row),
}
_GROUPS = {
    "weight_scale_second": Part(FLOATS, lambda n, k: [(n, k // W4A8_GROUP)], False),
    "weight_offset_second": Part(
        (*FLOATS, "I8", "I32", "I64"), lambda n, k: [(n, k // W4A8_GROUP)], False
    ),
}
PARTS: dict[str, dict[str, Part]] = {
    "W8A8": {
        **_CODES,
        **_STATIC,
        **{leaf: Part(part.dtypes, part.shapes, False) for leaf, part in _PER_CHANNEL.items()},
    },
    "W8A8_MIX": {**_CODES, **_STATIC, **_PER_CHANNEL},
    "W8A8_DYNAMIC": {**_CODES, **_PER_CHANNEL},
    "W8A16": {**_CODES, **_PER_CHANNEL},
    "W4A8_DYNAMIC": {
        "weight": Part(("I8",), lambda n, k: [(n // 2, k)]),
        **_PER_CHANNEL,
        **_GROUPS,
        "scale_bias": Part(("F32",), lambda n, k: [(n, 1), (n, 16)]),
    },
    "W4A4_DYNAMIC": {**_CODES, **_PER_CHANNEL},
    "W4A4_FLATQUANT_DYNAMIC": {
        **_CODES,
        **_PER_CHANNEL,
        "left_trans": Part(FLOATS, lambda n, k: _factor(k, 0)),
        "right_trans": Part(FLOATS, lambda n, k: _factor(k, 1)),
        "clip_ratio": Part(FLOATS, _one),
    },
}
