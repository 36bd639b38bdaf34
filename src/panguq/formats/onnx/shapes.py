"""Sizes, and ops that move, cut, join or make values, as ONNX nodes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from onnx import TensorProto
from torch import fx

from panguq.formats.onnx.builder import Value
from panguq.formats.onnx.step import Emitter, Step
from panguq.formats.onnx.types import NARROW, known_size
from panguq.ir.edit import label

_TO_THE_END = 2**63 - 1


def _size(step: Step) -> str:
    source, axis = step.arguments().values()
    axis %= step.rank(source)
    shape = step.add("Shape", step.read(source), suffix="shape", start=axis, end=axis + 1)
    return step.result("Squeeze", shape)


def _arithmetic(op_type: str, step: Step) -> str:
    left, right = (step.read(argument, torch.int64) for argument in step.node.args)
    return step.result(op_type, left, right)


def _item(step: Step) -> Value:
    source, index = step.node.args
    assert isinstance(source, fx.Node) and isinstance(index, int)
    values = step.builder.value(source)
    if isinstance(values, str):
        raise step.error(f"takes a part of {label(source)}, which is a single tensor")
    found: Value = values[index]
    return found


def _same(step: Step) -> str:
    return step.result("Identity", step.read(step.argument(0)))


def _nothing(step: Step) -> None:
    return None


def _cast(step: Step) -> str:
    source = step.argument(0)
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].dtype, step.dtype
    if before == after or (before in NARROW and after == torch.float32):
        return step.result("Identity", step.read(source))
    if after in NARROW:
        return step.finish("Identity", step.read(source, torch.float32))
    return step.result("Cast", step.read(source), to=step.elem_type)


def _reshape(step: Step) -> str:
    shape = step.integers(_sizes(step.argument(1)), "shape")
    # Sizes of 0 are meant as they are: an empty past.
    return step.result("Reshape", step.read(step.argument(0)), shape, allowzero=_allowzero(step))


def _allowzero(step: Step) -> int:
    """1 unless the shape has a -1, with which ONNX does not allow it."""
    return int(-1 not in _sizes(step.argument(1)))


def _sizes(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, list | tuple) else [argument]


def _expand(step: Step) -> str:
    x, sizes = step.argument(0), _sizes(step.argument(1))
    shape = step.integers([1 if size == -1 else size for size in sizes], "shape")
    return step.result("Expand", step.read(x), shape)


def _transpose(step: Step) -> str:
    x, first, second = step.node.args
    order = list(range(step.rank(x)))
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    return step.result("Transpose", step.read(x), perm=order)


def _turn(step: Step) -> str:
    x = step.argument(0)
    return step.result("Transpose", step.read(x), perm=list(range(step.rank(x)))[::-1])


def _permute(step: Step) -> str:
    x, order = step.argument(0), _sizes(step.argument(1))
    return step.result("Transpose", step.read(x), perm=[axis % step.rank(x) for axis in order])


def _unsqueeze(step: Step) -> str:
    x, axis = step.pair()
    return step.result("Unsqueeze", step.read(x), step.integers([axis], "axes"))


def _squeeze(step: Step) -> str:
    x, axes = step.argument(0), _sizes(step.argument(1))
    assert isinstance(x, fx.Node)
    single = [axis for axis in axes if known_size(x.meta["val"].shape[axis]) == 1]
    if not single:
        return step.result("Identity", step.read(x))
    return step.result("Squeeze", step.read(x), step.integers(single, "axes"))


def _slice(step: Step) -> str:
    given = step.arguments()
    limits = [given["start"] or 0, _TO_THE_END if given["end"] is None else given["end"]]
    inputs = [
        step.integers([value], name)
        for value, name in zip(
            [*limits, given["dim"], given["step"]], ("start", "end", "axis", "step"), strict=True
        )
    ]
    return step.result("Slice", step.read(given["self"]), *inputs)


def _select(step: Step) -> str:
    x, axis, index = step.node.args
    return step.result("Gather", step.read(x), step.read(index, torch.int64, "index"), axis=axis)


def _split(step: Step) -> Value:
    x, axis = step.argument(0), step.arguments()["dim"]
    widths = [known_size(part.shape[axis]) for part in step.node.meta["val"]]
    if any(width is None for width in widths):
        raise step.error("splits along a size that is not fixed")
    return step.results(
        "Split", step.read(x), step.integers(widths, "sizes"), count=len(widths), axis=axis
    )


def _flatten(step: Step) -> str:
    given = step.arguments()
    shape = given["self"].meta["val"].shape
    first, last = (given[name] % len(shape) for name in ("start_dim", "end_dim"))
    behind = list(shape[last + 1 :])
    if not all(isinstance(size, int) for size in behind):
        raise step.error("flattens before an axis of no fixed size, which is not written")
    sizes = step.integers([*[0] * first, -1, *behind], "sizes")  # 0 keeps an axis
    return step.result("Reshape", step.read(given["self"]), sizes)


def _unbind(step: Step) -> Value:
    given = step.arguments()
    x, axis = given["self"], given["dim"]
    names = []
    for index in range(len(step.node.meta["val"])):
        name = step.result_name(index)
        at = step.read(index, torch.int64, f"index_{index}")
        part = step.add("Gather", step.read(x), at, suffix=f"part_{index}", axis=axis)
        names.append(step.call_it(part, name))
    return tuple(names)


def _cat(step: Step) -> str:
    given = step.arguments()
    parts = [step.read(part, step.dtype) for part in given["tensors"]]
    return step.result("Concat", *parts, axis=given["dim"])


def _stack(step: Step) -> str:
    given = step.arguments()
    axes = step.integers([given["dim"]], "axes")
    parts = [
        step.add("Unsqueeze", step.read(part, step.dtype), axes, suffix=f"part_{index}")
        for index, part in enumerate(given["tensors"])
    ]
    return step.result("Concat", *parts, axis=given["dim"])


def _embedding(step: Step) -> str:
    table, ids = step.pair()
    return _gather(step, table, step.read(ids), 0)


def _index(step: Step) -> str:
    x, indices = step.arguments().values()
    places = [axis for axis, index in enumerate(indices) if index is not None]
    if any(indices[place].meta["val"].dtype == torch.bool for place in places):
        raise step.error("takes a mask as an index, which ONNX export does not write")
    if len(places) == 1:
        return _gather(step, x, step.read(indices[places[0]]), places[0])
    if places != list(range(len(places))):
        raise step.error("takes index tensors behind an axis that it leaves, which is not written")
    given = [step.read(indices[place], torch.int64, f"index_{place}") for place in places]
    total = functools.reduce(lambda one, other: step.add("Add", one, other, suffix="sum"), given)
    zeros = step.add("Sub", total, total, suffix="zeros")  # of the shape that all have together
    last = step.integers([-1], "axes")
    parts = [
        step.add("Unsqueeze", step.add("Add", index, zeros, suffix=f"at_{place}"), last,
                 suffix=f"part_{place}")
        for place, index in enumerate(given)
    ]  # fmt: skip
    at = step.add("Concat", *parts, suffix="places", axis=-1)
    return step.result("GatherND", step.read(x), at)


def _index_select(step: Step) -> str:
    x, axis, indices = step.node.args
    assert isinstance(axis, int)
    return _gather(step, x, step.read(indices), axis)


def _gather(step: Step, x: Any, indices: str, axis: int) -> str:
    """Gather; of a stored 16-bit table only the rows that were read are widened."""
    if x in step.builder.constants and x.meta["val"].dtype in NARROW:
        rows = step.add("Gather", step.builder.stored(x), indices, suffix="narrow", axis=axis)
        return step.result("Cast", rows, to=TensorProto.FLOAT)
    return step.result("Gather", step.read(x), indices, axis=axis)


def _repeat_interleave(step: Step) -> str:
    given = step.arguments()
    x, repeats, axis = given["self"], given["repeats"], given["dim"]
    if axis is None:
        raise step.error("repeats a flattened tensor, which ONNX export does not write")
    rank = step.rank(x)
    axis %= rank
    at = step.integers([axis + 1], "axes")
    apart = step.add("Unsqueeze", step.read(x), at, suffix="apart")
    times = step.integers([repeats if i == axis + 1 else 1 for i in range(rank + 1)], "times")
    repeated = step.add("Tile", apart, times, suffix="repeated")
    before = step.add("Shape", step.read(x), suffix="shape")
    factors = step.integers([repeats if i == axis else 1 for i in range(rank)], "factors")
    return step.result("Reshape", repeated, step.add("Mul", before, factors, suffix="grown"))


def _filled(value: Any, step: Step) -> str:
    given = step.arguments()
    filling = given.get("fill_value") if value is None else value
    sizes = given["size"]
    number = step.read(filling, step.dtype, "value")
    return step.result("Expand", number, step.integers(_sizes(sizes), "shape"))


def _filled_like(value: Any, step: Step) -> str:
    given = step.arguments()
    filling = given.get("fill_value") if value is None else value
    shape = step.add("Shape", step.read(given["self"]), suffix="shape")
    return step.result("Expand", step.read(filling, step.dtype, "value"), shape)


def _scalar_tensor(step: Step) -> str:
    return step.result("Identity", step.read(step.argument(0), step.dtype, "value"))


def _arange(step: Step) -> str:
    given = step.arguments()
    start, pace = given.get("start", 0), given.get("step", 1)
    limits = [step.read(value, step.dtype) for value in (start, given["end"], pace)]
    return step.result("Range", *limits)


def _pad(step: Step) -> str:
    """ONNX lists what comes before each axis, then what comes behind; ATen pairs, last axis first.

    Numbers below 0 cut off.
    """
    given = step.arguments()
    pads, rank = list(given["pad"]), step.rank(given["self"])
    if not all(isinstance(pad, int) for pad in pads):
        raise step.error("adds a number of elements that is not fixed")
    pads += [0] * (2 * rank - len(pads))
    amounts = step.integers([*pads[-2::-2], *pads[::-2]], "pads")
    value = step.read(given["value"], step.dtype, "value")
    return step.result("Pad", step.read(given["self"], step.dtype), amounts, value)


def _triangle(upper: int, step: Step) -> str:
    given = step.arguments()
    diagonal = step.read(given["diagonal"], torch.int64, "diagonal")
    return step.result("Trilu", step.read(given["self"]), diagonal, upper=upper)


_RESHAPES = ("_unsafe_view.default", "reshape.default", "view.default")
_SAME = (
    "alias.default", "clone.default", "contiguous.default", "detach.default", "dropout.default",
    "lift_fresh_copy.default",
)  # fmt: skip
_CASTS = (
    "_to_copy.default", "to.device", "to.dtype", "to.dtype_layout", "type_as.default",
)  # fmt: skip

EMITTERS: dict[str, Emitter] = {
    "aten.flatten.using_ints": _flatten,
    **{f"aten.{name}": _reshape for name in _RESHAPES},
    **{f"aten.{name}": _same for name in _SAME},
    **{f"aten.{name}": _cast for name in _CASTS},
    "aten._assert_scalar.default": _nothing,
    "aten._assert_tensor_metadata.default": _nothing,
    "aten.arange.default": _arange,
    "aten.arange.start": _arange,
    "aten.arange.start_step": _arange,
    "aten.cat.default": _cat,
    "aten.chunk.default": _split,
    "aten.constant_pad_nd.default": _pad,
    "aten.embedding.default": _embedding,
    "aten.expand.default": _expand,
    "aten.full.default": functools.partial(_filled, None),
    "aten.full_like.default": functools.partial(_filled_like, None),
    "aten.index.Tensor": _index,
    "aten.index_select.default": _index_select,
    "aten.new_full.default": functools.partial(_filled, None),
    "aten.new_ones.default": functools.partial(_filled, 1),
    "aten.new_zeros.default": functools.partial(_filled, 0),
    "aten.ones.default": functools.partial(_filled, 1),
    "aten.ones_like.default": functools.partial(_filled_like, 1),
    "aten.permute.default": _permute,
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.scalar_tensor.default": _scalar_tensor,
    "aten.select.int": _select,
    "aten.slice.Tensor": _slice,
    "aten.split.Tensor": _split,
    "aten.split.sizes": _split,
    "aten.split_with_sizes.default": _split,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.stack.default": _stack,
    "aten.sym_size.int": _size,
    "aten.t.default": _turn,
    "aten.transpose.int": _transpose,
    "aten.tril.default": functools.partial(_triangle, 0),
    "aten.triu.default": functools.partial(_triangle, 1),
    "aten.unbind.int": _unbind,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.zeros.default": functools.partial(_filled, 0),
    "aten.zeros_like.default": functools.partial(_filled_like, 0),
    "operator.add": functools.partial(_arithmetic, "Add"),
    "operator.floordiv": functools.partial(_arithmetic, "Div"),
    "operator.getitem": _item,
    "operator.mul": functools.partial(_arithmetic, "Mul"),
    "operator.sub": functools.partial(_arithmetic, "Sub"),
    "torch.sym_max": functools.partial(_arithmetic, "Max"),
    "torch.sym_min": functools.partial(_arithmetic, "Min"),
}
