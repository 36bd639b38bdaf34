"""Mixtures of experts as ONNX nodes: a choice, a sort, and a Loop over the experts that have rows.

A turn of the Loop takes the rows of one expert and its weight, so that no weight is copied once a
row, and weights of experts without rows are not read. What the turns give is kept in a sequence and
joined at the end: memory is that of the rows, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from panguq.formats.onnx.builder import Value
from panguq.formats.onnx.step import Emitter, Step
from panguq.formats.onnx.types import NARROW, stored_type

OwnValues = list[str | None]
_NARROW_TYPES = tuple(stored_type(dtype, "") for dtype in NARROW)


# --- the choice and the sort ----------------------------------------------------------------------


def _top_k(step: Step) -> Value:
    """ONNX takes the first of equal values; PyTorch promises no order of them."""
    given = step.arguments()
    results = [step.result_name(index) for index in range(2)]
    attributes = {"axis": given["dim"], "largest": int(given["largest"])}
    return step.several(
        "TopK",
        step.read(given["self"]),
        step.integers([given["k"]], "k"),
        results=results,
        sorted=int(given["sorted"]),
        **attributes,
    )


def _gather(step: Step) -> str:
    given = step.arguments()
    x, index = step.read(given["self"], step.dtype), step.read(given["index"], torch.int64)
    return step.result("GatherElements", x, index, axis=given["dim"])


def _scatter(step: Step) -> str:
    given = step.arguments()
    index = step.read(given["index"], torch.int64)
    shape = step.add("Shape", index, suffix="shape")
    value = step.read(given["value"], step.dtype, "value")
    values = step.add("Expand", value, shape, suffix="values")
    x = step.read(given["self"], step.dtype)
    return step.result("ScatterElements", x, index, values, axis=given["dim"])


def _route_tokens(step: Step) -> Value:
    given = step.arguments()
    order, counts = step.result_name(0), step.result_name(1)
    found = rows_by_expert(step, step.read(given["expert_ids"], torch.int64), given["experts"])
    return (step.call_it(found[0], order), step.call_it(found[1], counts))


def rows_by_expert(step: Step, ids: str, experts: int) -> tuple[str, str]:
    """int64 `[r]`, the order that sorts ids `[t, top_k]`, and `[experts]`, rows of each expert."""
    flat = step.add("Reshape", ids, step.integers([-1], "flat"), suffix="ids")
    rows = step.add("Shape", flat, suffix="rows")
    order = step.builder.unique(f"{step.label}.order")
    smallest = step.builder.unique(f"{step.label}.sorted_ids")
    # Equal ids stay in order: ONNX takes the one with the lower index first.
    step.several("TopK", flat, rows, results=[smallest, order], axis=0, largest=0, sorted=1)
    none = step.builder.add_tensor(f"{step.label}.none", torch.zeros(experts, dtype=torch.int64))
    ones = step.add("Expand", step.number(1, torch.int64, "one"), rows, suffix="ones")
    summed: dict[str, Any] = {"axis": 0, "reduction": "add"}
    counts = step.add("ScatterElements", none, flat, ones, suffix="counts", **summed)
    return order, counts


def _permute_tokens(step: Step) -> str:
    given = step.arguments()
    order, top_k = step.read(given["order"]), step.number(given["top_k"], torch.int64, "top_k")
    token = step.add("Div", order, top_k, suffix="token")
    return step.result("Gather", step.read(given["x"]), token, axis=0)


def _combine_experts(step: Step) -> str:
    given = step.arguments()
    order = step.read(given["order"], torch.int64)
    rows = step.add("Size", order, suffix="count")
    zero, one = (step.number(value, torch.int64, f"number_{value}") for value in (0, 1))
    at = step.add("Range", zero, rows, one, suffix="at")
    places = step.add("ScatterElements", order, order, at, suffix="places", axis=0)
    return step.finish(*weighted_sum(step, given["rows"], places, given["routing_weights"]))


def weighted_sum(step: Step, rows: fx.Node, places: str, weights: fx.Node) -> tuple[str, str, str]:
    """The last node of `sum_j weights[i, j] * rows[places[i * top_k + j]]`, `[t, n]`."""
    wide = torch.float64 if rows.meta["val"].dtype == torch.float64 else torch.float32
    top_k, n = (int(tensor.meta["val"].shape[1]) for tensor in (weights, rows))
    placed = step.add("Gather", step.read(rows, wide), places, suffix="placed", axis=0)
    each = step.add("Reshape", placed, step.integers([-1, top_k, n], "each"), suffix="each")
    axis = step.integers([1], "axis")
    factors = step.add("Unsqueeze", step.read(weights, wide), axis, suffix="factors")
    product = step.add("MatMul", factors, each, suffix="weighted")
    return "Squeeze", product, axis


# --- the matmuls ----------------------------------------------------------------------------------


class Split(NamedTuple):
    """OwnValues of int64 `[experts]`: how many rows each expert has, and where they end."""

    counts: str
    ends: str


def by_counts(step: Step, counts: str) -> Split:
    """Rows divided by the number that each expert has."""
    axis = step.builder.add_tensor(f"{step.label}.first_axis", torch.tensor(0))
    return Split(counts, step.add("CumSum", counts, axis, suffix="ends"))


def by_ends(step: Step, ends: str) -> Split:
    """Rows divided by where each expert's end."""
    shifted = step.add("Pad", ends, step.integers([1, -1], "shift"), suffix="starts")
    return Split(step.add("Sub", ends, shifted, suffix="counts"), ends)


def each_expert(
    step: Step,
    split: Split,
    rows: Sequence[str],
    own: Sequence[str | None],
    width: int,
    make: Callable[[list[str], OwnValues], str],
) -> str:
    """A sequence of floats `[rows of an expert, width]`: ConcatFromSequence gives `[r, width]`.

    `make` writes what one expert gives: it gets that expert's part of `rows` `[r, ...]`, sorted by
    expert, and of `own` `[experts, ...]`, 16-bit floats widened. What else it reads must have been
    read before.
    """
    dtype = torch.float64 if step.dtype == torch.float64 else torch.float32
    used = step.add("NonZero", split.counts, suffix="with_rows")
    used = step.add("Reshape", used, step.integers([-1], "flat"), suffix="used")
    turns = step.add("Size", used, suffix="turns")
    nothing = step.builder.add_tensor(f"{step.label}.nothing", torch.empty((0, width), dtype=dtype))
    empty = step.add("SequenceConstruct", nothing, suffix="empty")
    single, first = step.integers([1], "single"), step.integers([0], "rows_axis")
    turn, go_on, before, after = (
        step.builder.unique(f"{step.label}.{name}") for name in ("turn", "go_on", "before", "after")
    )
    with step.subgraph() as nodes:
        expert = step.add("Gather", used, turn, suffix="expert", axis=0)
        limits = []
        for name, source in (("end", split.ends), ("count", split.counts)):
            number = step.add("Gather", source, expert, suffix=f"{name}_at", axis=0)
            limits.append(step.add("Reshape", number, single, suffix=name))
        start = step.add("Sub", *limits, suffix="start")
        parts = [
            step.add("Slice", name, start, limits[0], first, suffix=f"rows_{index}")
            for index, name in enumerate(rows)
        ]
        made = make(parts, [_own(step, name, expert, index) for index, name in enumerate(own)])
        grown = step.add("SequenceInsert", before, made, suffix="grown")
        still = step.add("Identity", go_on, suffix="still")
    tensor = helper.make_tensor_type_proto(stored_type(dtype, step.label), None)
    sequence = helper.make_sequence_type_proto(tensor)
    inputs = [
        helper.make_tensor_value_info(turn, TensorProto.INT64, []),
        helper.make_tensor_value_info(go_on, TensorProto.BOOL, []),
        helper.make_value_info(before, sequence),
    ]
    outputs = [
        helper.make_tensor_value_info(still, TensorProto.BOOL, []),
        helper.make_value_info(grown, sequence),
    ]
    body = helper.make_graph(nodes, f"{step.label}.one_expert", inputs, outputs)
    step.several("Loop", turns, "", empty, results=[after], body=body)
    return after


def _own(step: Step, name: str | None, expert: str, index: int) -> str | None:
    if name is None:
        return None
    found = step.add("Gather", name, expert, suffix=f"own_{index}", axis=0)
    if step.builder.elem_type(name) not in _NARROW_TYPES:
        return found
    return step.add("Cast", found, suffix=f"own_{index}.float32", to=TensorProto.FLOAT)


def stored(step: Step, argument: Any) -> str | None:
    """A stored tensor in its own dtype, or the name of a computed one; None stays None."""
    if argument is None:
        return None
    if argument in step.builder.constants:
        return step.builder.stored(argument)
    return step.read(argument, step.dtype)


def product(step: Step, x: str, weight: str | None, bias: str | None) -> str:
    """`x @ weight.T + bias` of matrices."""
    assert weight is not None
    operands = [x, weight] if bias is None else [x, weight, bias]
    return step.add("Gemm", *operands, suffix="product", transB=1)


def joined_rows(
    step: Step,
    counts: fx.Node,
    rows: Sequence[str],
    own: Sequence[str | None],
    make: Callable[[list[str], OwnValues], str],
) -> str:
    """The node's result, of what `each_expert` gives; rows of experts that are no members are 0."""
    width = int(step.node.meta["val"].shape[1])
    split, members = by_counts(step, step.read(counts)), step.arguments()["members"]
    if members is None:
        sequence = each_expert(step, split, rows, own, width, make)
        return step.finish("ConcatFromSequence", sequence, axis=0)
    which = step.integers(list(members), "members")
    their = Split(*(step.add("Gather", part, which, suffix=f"of_{name}", axis=0)
                    for name, part in zip(Split._fields, split, strict=True)))  # fmt: skip
    found = each_expert(step, their, rows, own, width, make)
    found = step.add("ConcatFromSequence", found, suffix="found", axis=0)
    at, shape = _rows_of(step, split, members, rows[0], width)
    zero = torch.zeros(1, dtype=torch.float64 if step.dtype == torch.float64 else torch.float32)
    nothing = step.add("ConstantOfShape", shape, suffix="zeros", value=numpy_helper.from_array(
        zero.numpy()))  # fmt: skip
    return step.finish("ScatterND", nothing, at, found)


def _rows_of(
    step: Step, split: Split, members: Sequence[int], rows: str, width: int
) -> tuple[str, str]:
    """int64 `[rows of members, 1]`, which rows these are, and the shape `[r, width]` of all."""
    count = step.add("Shape", rows, suffix="row_count", start=0, end=1)
    scalar = step.add("Squeeze", count, suffix="row_total")
    zero, one = (step.number(value, torch.int64, f"number_{value}") for value in (0, 1))
    every = step.add("Range", zero, scalar, one, suffix="every_row")
    column = step.add("Unsqueeze", every, step.integers([1], "column"), suffix="each_row")
    passed = step.add("LessOrEqual", split.ends, column, suffix="passed")  # experts that ended
    passed = step.add("Cast", passed, suffix="passed_int", to=TensorProto.INT64)
    axis = step.integers([1], "experts_axis")
    expert = step.add("ReduceSum", passed, axis, suffix="expert_of_row", keepdims=0)
    experts = int(step.arguments()["counts"].meta["val"].shape[0])
    table = torch.zeros(experts, dtype=torch.bool)
    table[list(members)] = True
    known = step.builder.add_tensor(f"{step.label}.is_member", table)
    mask = step.add("Gather", known, expert, suffix="is_member", axis=0)
    found = step.add("NonZero", mask, suffix="member_rows")
    at = step.add("Transpose", found, suffix="at", perm=[1, 0])
    return at, step.add("Concat", count, step.integers([width], "width"), suffix="shape", axis=0)


def _expert_linear(step: Step) -> str:
    given = step.arguments()
    x = step.read(given["x"], step.dtype)
    own = [stored(step, given["weight"]), stored(step, given["bias"])]

    def make(rows: list[str], own: OwnValues) -> str:
        return product(step, rows[0], *own)

    return joined_rows(step, given["counts"], [x], own, make)


EMITTERS: dict[str, Emitter] = {
    "aten.gather.default": _gather,
    "aten.scatter.value": _scatter,
    "aten.topk.default": _top_k,
    "panguq.combine_experts.default": _combine_experts,
    "panguq.expert_linear.default": _expert_linear,
    "panguq.permute_tokens.default": _permute_tokens,
    "panguq.route_tokens.default": _route_tokens,
}
