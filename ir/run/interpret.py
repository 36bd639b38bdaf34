"""Run a graph, or a part of it, node by node on real tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from panguq.errors import NumericsError
from panguq.ir.edit import ancestors, get_tensor, label
from panguq.tensors.folded_weight import materialized
from panguq.tensors.row_slices import row_slices

Values = dict[fx.Node, Any]


def compute(gm: fx.GraphModule, node: fx.Node, environment: Mapping[fx.Node, Any]) -> Any:
    """The value of one node, given its inputs' values."""
    if node.op == "get_attr":
        return materialized(get_tensor(gm, str(node.target)))
    args = fx.map_arg(node.args, lambda n: environment[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: environment[n])
    assert callable(node.target)
    return node.target(*args, **kwargs)


def without_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend only on stored tensors."""
    fixed: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and node.all_input_nodes
            and all(n in fixed for n in node.all_input_nodes)
        ):
            fixed.add(node)
    return fixed


def last_uses(nodes: list[fx.Node], unread: bool = False) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nobody in `nodes` reads after it.

    With `unread`, also those that nobody reads at all, as soon as they are there.
    """
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if unread:
            last.setdefault(node, node)
        for source in node.all_input_nodes:
            last[source] = node
    freed: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        freed.setdefault(node, []).append(source)
    return freed


def weights_late(nodes: list[fx.Node]) -> list[fx.Node]:
    """The same nodes, each weight right before its first reader.

    Graphs read all their weights first, and one that is computed takes memory from then on.
    """
    given, placed = set(nodes), set[fx.Node]()
    order: list[fx.Node] = []
    for node in nodes:
        if node.op == "get_attr" and any(user in given for user in node.users):
            continue
        weights = [n for n in node.all_input_nodes if n.op == "get_attr" and n not in placed]
        placed.update(weights)
        order += [*weights, node]
    return order


def _in_order(
    gm: fx.GraphModule, order: list[fx.Node], inputs: Mapping[str, Tensor]
) -> Iterator[tuple[fx.Node, Values]]:
    """Each node of `order` once it is computed, with all values that are still needed."""
    freed = last_uses(order)
    environment: Values = {}
    for node in order:
        given = node.op == "placeholder"
        environment[node] = inputs[str(node.target)] if given else compute(gm, node, environment)
        yield node, environment
        for source in freed.get(node, ()):
            del environment[source]


def values(
    gm: fx.GraphModule, inputs: Mapping[str, Tensor], wanted: Iterable[fx.Node]
) -> dict[fx.Node, Any]:
    """The values of the `wanted` nodes for inputs given by placeholder name."""
    keep = set(wanted)
    needed = ancestors(keep)
    order = weights_late([n for n in gm.graph.nodes if n in needed])
    found: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node, environment in _in_order(gm, order, inputs):
            if node in keep:
                found[node] = environment[node]
    return found


def run(gm: fx.GraphModule, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """All outputs of the graph for inputs given by placeholder name."""
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        return gm(*(inputs[name] for name in names))


def ensure_finite(name: str, tensor: Tensor, kind: str = "weight") -> None:
    """Raises NumericsError that names the tensor if it holds NaN or Inf."""
    if not tensor.is_floating_point():
        return
    tensor = _comparable(materialized(tensor))
    bad = 0
    if not _all_finite(tensor):
        bad = sum(int((~torch.isfinite(tensor[some])).sum()) for some in row_slices(tensor))
    if bad:
        raise NumericsError(
            f"{kind} {name} {list(tensor.shape)} holds {bad} values that are NaN or Inf",
            "the checkpoint is damaged or overflowed its dtype; panguq cannot quantize it"
            if kind == "weight"
            else "the model itself overflows on this calibration input",
        )


def _comparable(tensor: Tensor) -> Tensor:
    """The tensor, or its copy in float32: torch does not compare 8-bit floats."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _all_finite(tensor: Tensor) -> bool:
    """Without a copy: a NaN becomes both smallest and largest value."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _is_broken(node: fx.Node, value: Any, environment: Values) -> bool:
    """Whether this value is not finite, other than by the -inf of a mask that it was given."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    value = _comparable(value)
    if torch.isfinite(value).all():
        return False
    given = [environment[source] for source in node.all_input_nodes]
    masks = -math.inf in node.args or any(
        isinstance(x, Tensor) and x.is_floating_point() and bool((x == -math.inf).any())
        for x in given
    )
    return not masks or not bool((torch.isfinite(value) | (value == -math.inf)).all())


def first_non_finite(gm: fx.GraphModule, inputs: Mapping[str, Tensor]) -> str | None:
    """The label of the first node that yields NaN or Inf on these inputs, if any."""
    order = [n for n in gm.graph.nodes if n.op != "output"]
    with torch.no_grad():
        for node, environment in _in_order(gm, order, inputs):
            if node.op != "placeholder" and _is_broken(node, environment[node], environment):
                return label(node)
    return None
