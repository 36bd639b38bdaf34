"""What a call reads, under the names of its operands instead of their positions.

A view is a call of one op: `Linear.match(node)` is one or None, `Linear.of(node)` one or an error.
It holds only the node and reads its arguments anew each time, so no edit leaves it behind. Ops are
told apart by name, since the modules that define some of them stand above this one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx
from torch._ops import OpOverload

from panguq.ir.call_arguments import (
    argument,
    arguments,
    calls,
    operand,
    optional_operand,
)
from panguq.ir.edit import label, read_instead
from panguq.ir.number_format import INT4, INT8, Integer, NumberFormat, find_number_format

_View = TypeVar("_View", bound="View")


@dataclass(frozen=True)
class View:
    """A call of the op called `op`, or of `encoded`, which does its work in any number format."""

    node: fx.Node
    op: ClassVar[str]
    encoded: ClassVar[str | None] = None

    @classmethod
    def match(cls: type[_View], node: object) -> _View | None:
        """The view of this node, of a kind of its own where there is one; None if it is no call."""
        if not isinstance(node, fx.Node) or not isinstance(node.target, OpOverload):
            return None
        name = node.target.name()
        kinds = (cls, *cls.__subclasses__())
        return next((kind(node) for kind in kinds if name in (kind.op, kind.encoded)), None)

    @classmethod
    def of(cls: type[_View], node: fx.Node) -> _View:
        """The view of this node. Raises TypeError, naming it, if it is no call of the op."""
        view = cls.match(node)
        if view is None:
            raise TypeError(f"{label(node)} calls {node.target}, not {cls.op}")
        return view

    def _named(self, name: str) -> Any:
        """The argument of this name; None if the op has none of it."""
        return arguments(self.node).get(name)

    @property
    def _encoding(self) -> NumberFormat | None:
        """The format that the call names; None for the integers' own op."""
        name = self._named("format")
        return None if name is None else find_number_format(name)


class Linear(View):
    """`aten.linear(input, weight, bias)`: `input @ weight.T + bias`, weight `[n, k]`."""

    op = "aten::linear"

    @property
    def input(self) -> fx.Node:
        """What is multiplied, `[..., k]`; it may be quantized and dequantized."""
        return operand(self.node, 0)

    @property
    def weight(self) -> fx.Node:
        """The weight `[n, k]`: stored, or computed from codes."""
        return operand(self.node, 1)

    @property
    def bias(self) -> fx.Node | None:
        """The bias `[n]`, if there is one."""
        return optional_operand(self.node, 2)

    @property
    def shape(self) -> tuple[int, int]:
        """n and k of the weight."""
        n, k = self.weight.meta["val"].shape
        return int(n), int(k)

    @property
    def is_stored(self) -> bool:
        """Whether the weight is a stored tensor."""
        return self.weight.op == "get_attr"

    @property
    def weight_name(self) -> str:
        """The name of the stored weight."""
        return str(self.weight.target)

    @property
    def source(self) -> fx.Node:
        """The float value that is read, before it was quantized."""
        quantized = QuantizedInput.match(self.input)
        return self.input if quantized is None else quantized.source

    def operands_with(self, weight: fx.Node) -> tuple[Any, ...]:
        """What a linear reads that differs from this one in its weight."""
        return (self.input, weight, *self.node.args[2:])

    def read_input(self, value: fx.Node) -> None:
        """Let the linear multiply this value."""
        read_instead(self.node, 0, value)

    def read_weight(self, weight: fx.Node) -> None:
        """Let the linear multiply by this weight."""
        read_instead(self.node, 1, weight)


class ExpertLinear(Linear):
    """`expert_linear(x, weight, bias, counts, members)`: a linear of every expert, or of `members`.

    x `[r, k]` is sorted by expert; weight `[experts, n, k]`; bias `[experts, n]`.
    """

    op = "panguq::expert_linear"

    @property
    def shape(self) -> tuple[int, int]:
        """n and k of one expert's weight."""
        _, n, k = self.weight.meta["val"].shape
        return int(n), int(k)

    @property
    def experts(self) -> int:
        """How many have a weight here."""
        return int(self.weight.meta["val"].shape[0])

    @property
    def members(self) -> tuple[int, ...] | None:
        """Which these are, where others have weights of another scheme; None for all."""
        found: list[int] | None = self._named("members")
        return None if found is None else tuple(found)

    @property
    def each(self) -> tuple[int, ...]:
        """The experts whose weights these are, in the weights' order."""
        return tuple(range(self.experts)) if self.members is None else self.members

    @property
    def counts(self) -> fx.Node:
        """int64 `[experts]`: each expert's rows."""
        return operand(self.node, 3)


class QuantizedInput(View):
    """`dequantize(codes, scale, zero_point, dtype)`: a value that went through a quantizer.

    Or `decode_per_token(codes, scale, format, dtype)`.
    """

    op = "panguq::dequantize"
    encoded = "panguq::decode_per_token"

    @property
    def codes(self) -> fx.Node:
        """Codes of the value's shape, in the format's dtype."""
        return operand(self.node, 0)

    @property
    def scale(self) -> fx.Node:
        """float32 `[1]`, stored, or one for each token, computed."""
        return operand(self.node, 1)

    @property
    def zero_point(self) -> fx.Node | None:
        """int32 `[1]`; None for 0."""
        found: fx.Node | None = self._named("zero_point")
        return found

    @property
    def dtype(self) -> torch.dtype:
        """What the codes are dequantized to."""
        found: torch.dtype = self._named("dtype")
        return found

    @property
    def quantizer(self) -> fx.Node:
        """The call that made the codes, alone or with their scale."""
        item = Item.match(self.codes)
        return self.codes if item is None else item.source

    @property
    def source(self) -> fx.Node:
        """The float value that was quantized."""
        return operand(self.quantizer, 0)

    @property
    def is_static(self) -> bool:
        """Whether one stored scale serves all tokens."""
        return calls(self.quantizer, "panguq::quantize_per_tensor")


class QuantizedWeight(View):
    """`quantize_weight(weight, scale, zero_point, group_size, ...)`: codes of a float weight.

    Or `encode_weight(weight, scale, group_size, format)`.
    """

    op = "panguq::quantize_weight"
    encoded = "panguq::encode_weight"

    @property
    def weight(self) -> fx.Node:
        """The float weight `[n, k]`, stored."""
        return operand(self.node, 0)

    @property
    def weight_name(self) -> str:
        """The name of the float weight."""
        return str(self.weight.target)

    @property
    def scale(self) -> fx.Node:
        """Stored, `[n, k / group_size]`."""
        return operand(self.node, 1)

    @property
    def zero_point(self) -> fx.Node | None:
        """Stored, of the scale's shape; None for 0."""
        found: fx.Node | None = self._named("zero_point")
        return found

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return int(self._named("group_size"))

    @property
    def format(self) -> NumberFormat:
        """Of the codes."""
        return self._encoding or Integer(int(self._named("quant_max")).bit_length() + 1)

    @property
    def dequantized(self) -> DequantizedWeight:
        """What the codes stand for."""
        return DequantizedWeight.of(next(iter(self.node.users)))


class DequantizedWeight(View):
    """`dequantize_weight(codes, scale, zero_point, group_size, dtype)`: a weight from its codes.

    Or `decode_weight(codes, scale, group_size, format, dtype)`.
    """

    op = "panguq::dequantize_weight"
    encoded = "panguq::decode_weight"

    @property
    def codes(self) -> fx.Node:
        """`[n, k]`: stored, unpacked from what is stored, or made by a `QuantizedWeight`."""
        return operand(self.node, 0)

    @property
    def scale(self) -> fx.Node:
        """Stored, `[n, k / group_size]`."""
        return operand(self.node, 1)

    @property
    def zero_point(self) -> fx.Node | None:
        """Stored, of the scale's shape; None for 0."""
        found: fx.Node | None = self._named("zero_point")
        return found

    @property
    def group_size(self) -> int:
        """Inputs per scale."""
        return int(self._named("group_size"))

    @property
    def dtype(self) -> torch.dtype:
        """What the codes are dequantized to."""
        found: torch.dtype = self._named("dtype")
        return found

    @property
    def packed(self) -> fx.Node:
        """The codes, as bytes of two where they are unpacked from such: uint8 `[n, k / 2]`."""
        return operand(self.codes, 0) if self.is_packed else self.codes

    @property
    def is_packed(self) -> bool:
        """Whether the codes are unpacked from bytes of two."""
        return calls(self.codes, "panguq::unpack_int4")

    @property
    def quantizer(self) -> QuantizedWeight | None:
        """What makes the codes, where they are not stored yet."""
        return QuantizedWeight.match(self.codes)

    @property
    def format(self) -> NumberFormat | None:
        """Of the codes; None where groups of one weight differ."""
        if self._encoding is not None:
            return self._encoding
        if self.quantizer is not None:
            return self.quantizer.format
        if calls(self.codes, "panguq::unpack_codes"):
            return Integer(int(argument(self.codes, 1)))
        if calls(self.codes, "panguq::unpack_mixed_codes"):
            return None
        return INT4 if self.is_packed else INT8


class BinaryWeight(View):
    """`dequantize_binary(codes, magnitudes, salient, block_size, dtype)`: a weight of billm."""

    op = "panguq::dequantize_binary"

    @property
    def stored(self) -> tuple[Any, ...]:
        """The codes, magnitudes, salient columns and the block size."""
        return self.node.args[:4]


class Item(View):
    """`source[index]`: one result of a call that has several."""

    op = "getitem"

    @classmethod
    def match(cls, node: object) -> Item | None:
        """The view of this node; None if it takes no result out of several."""
        if isinstance(node, fx.Node) and node.target is operator.getitem:
            return Item(node)
        return None

    @property
    def source(self) -> fx.Node:
        """The call."""
        return operand(self.node, 0)

    @property
    def index(self) -> int:
        """Which result."""
        return int(argument(self.node, 1))


# --- a whole graph ------------------------------------------------------------------------------


def results_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The values that the graph returns, in order."""
    returned = next(reversed(gm.graph.nodes)).args[0]
    found = returned if isinstance(returned, (list, tuple)) else (returned,)
    return [node for node in found if isinstance(node, fx.Node)]


def by_input(linears: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Linears by the value that they read, both in the order given."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in linears:
        readers.setdefault(Linear.of(node).input, []).append(node)
    return readers


def matmul_of(weight: fx.Node) -> fx.Node:
    """The first linear that a weight, its codes or what they were made of, ends in.

    Raises TypeError, naming the node, if no linear reads it.
    """
    node = weight
    while Linear.match(node) is None:
        reader = next(iter(node.users), None)
        if reader is None:
            raise TypeError(f"no linear reads {label(weight)}")
        node = reader
    return node
