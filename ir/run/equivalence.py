"""Proof on the spot that an exact pass changed no function: both graphs run in float64.

Casts to narrower floats are lifted, so what remains is the rounding of the weights that the
pass rewrote: each was rounded once to its dtype, a relative error of half its epsilon. Outputs
may differ by `TOLERANCE_IN_EPSILONS` epsilons of the widest weight dtype, relative to the
largest output. Below a dtype's normal numbers, where steps no longer shrink with the numbers, that
is not enough: there the proof measures what a step of each rewritten weight does (`_step_effects`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from panguq.errors import NumericsError
from panguq.ir.call_arguments import argument, calls, operand
from panguq.ir.edit import ancestors, find_label, get_tensor, label, weights_of
from panguq.ir.probe_sizes import PROBE_SIZES, SITE_PROBE_SIZES, Sizes, probe_size
from panguq.ir.run.interpret import Values, ensure_finite, last_uses
from panguq.ir.views import ExpertLinear, Item, Linear, results_of
from panguq.tensors.folded_weight import materialized
from panguq.tensors.row_slices import ELEMENTS_AT_ONCE, row_slices

aten = torch.ops.aten
TOLERANCE_IN_EPSILONS = 16
TOLERANCE_IN_STEPS = 2  # rounding moves a subnormal weight by half a step at most
ROUTE_TOKENS = "panguq::route_tokens"
Weights = Callable[[fx.GraphModule, str], Tensor]
Once = Callable[[str, Sequence[fx.GraphModule], Callable[..., float]], float]
"""`once(what, graphs, check)` is what `check(*graphs)` returns, or did in an earlier run."""


def _lift(value: Any) -> Any:
    """Floating-point tensors and dtypes become float64, complex ones complex128; the rest stays."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, Tensor) and value.is_complex():
        return value.to(torch.complex128)
    if isinstance(value, torch.dtype):
        if value.is_complex:
            return torch.complex128
        return torch.float64 if value.is_floating_point else value
    return value


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128) if value.is_complex() else value.double()


def run_in_float64(
    gm: fx.GraphModule,
    inputs: Mapping[fx.Node, Tensor],
    outputs: list[fx.Node],
    weights: Weights = get_tensor,
) -> dict[fx.Node, Tensor]:
    """The `outputs` in float64, given the values of the nodes that the region starts from.

    `weights` gives the graph's stored tensors by name.
    """
    needed = ancestors(outputs, stop=inputs)
    order = [n for n in gm.graph.nodes if n in needed]
    freed = last_uses(order)
    environment: Values = {}

    def value(node: fx.Node) -> Any:
        """A weight is lifted where it is read and kept nowhere: all at once are twice the model."""
        if node.op == "get_attr" and node not in environment:
            return _lift(weights(gm, str(node.target)))
        return environment[node]

    with torch.no_grad():
        for node in order:
            if node in inputs:
                environment[node] = _lift(inputs[node])
            elif node.op == "get_attr":
                pass
            elif (large := _on_large_weight(gm, node, value, weights)) is not None:
                environment[node] = large
            else:
                args = fx.map_arg(node.args, value)
                lifted = tuple(_lift(a) for a in args)
                kwargs = fx.map_arg(node.kwargs, value)
                assert callable(node.target)
                environment[node] = node.target(*lifted, **{k: _lift(v) for k, v in kwargs.items()})
            for source in freed.get(node, ()):
                if source not in outputs:
                    environment.pop(source, None)
    return {node: value(node) for node in outputs}


def _on_large_weight(
    gm: fx.GraphModule, node: fx.Node, value: Callable[[fx.Node], Any], weights: Weights
) -> Tensor | None:
    """An embedding or a linear in float64, its stored weight lifted row by row where it is large.

    None for everything else: a vocabulary's weight in float64 may take more than all memory.
    """
    experts = ExpertLinear.match(node)
    if experts is not None:
        return _of_experts(gm, experts, value, weights)
    if node.target not in (aten.embedding.default, aten.linear.default):
        return None
    table, index = (0, 1) if node.target is aten.embedding.default else (1, 0)
    stored = operand(node, table)
    if stored.op != "get_attr":
        return None
    weight = materialized(weights(gm, str(stored.target)))
    if weight.numel() <= ELEMENTS_AT_ONCE or not weight.is_floating_point():
        return None
    given = _lift(value(operand(node, index)))
    if node.target is aten.embedding.default:
        return _lift(torch.nn.functional.embedding(given, weight))
    product = given.new_empty((*given.shape[:-1], len(weight)))
    for rows in row_slices(weight):
        product[..., rows] = torch.nn.functional.linear(given, _lift(weight[rows]))
    bias = Linear.of(node).bias
    return product if bias is None else product + _lift(value(bias))


def _of_experts(
    gm: fx.GraphModule,
    linear: ExpertLinear,
    value: Callable[[fx.Node], Any],
    weights: Weights,
) -> Tensor | None:
    """A matmul of experts in float64, one expert's stored weight lifted at a time."""
    if not linear.is_stored or linear.members is not None:
        return None
    stored = materialized(weights(gm, linear.weight_name))
    rows = _lift(value(linear.input)).split(value(linear.counts).tolist())
    biases = [None] * len(rows) if linear.bias is None else _lift(value(linear.bias))
    parts = zip(rows, stored, biases, strict=True)
    return torch.cat([torch.nn.functional.linear(x, _lift(w), bias) for x, w, bias in parts])


def probe_value(gm: fx.GraphModule, node: fx.Node, generator: torch.Generator, sizes: Sizes) -> Any:
    """A random value of the node's type: float64 normal, all-true mask, small integers."""
    val = node.meta["val"]
    if isinstance(val, torch.SymInt):
        return probe_size(gm, val, sizes)
    shape = tuple(probe_size(gm, s, sizes) for s in val.shape)
    if val.dtype.is_floating_point or val.dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=_lift(val.dtype))
    if val.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool).tril(shape[-1] - shape[-2])
    high = min(sizes["seq"], *shape[-1:]) if node.target == "logit_positions" else _rows(node)
    return torch.randint(0, max(high, 1), shape, generator=generator)


def _rows(node: fx.Node) -> int:
    """Below what integers of this input lie: 4, or the rows of a smaller table that they look up,
    such as that of a text's two parts."""
    routings = [user for user in node.users if calls(user, ROUTE_TOKENS)]
    if routings:  # they are ids of experts
        return int(argument(routings[0], 1))
    readers, tables = list(node.users), []
    for reader in readers:
        if reader.target is aten.embedding.default and operand(reader, 1) in (node, *readers):
            tables.append(int(operand(reader, 0).meta["val"].shape[0]))
        elif len(reader.all_input_nodes) == 1:
            readers += [user for user in reader.users if user not in readers]
    return min([4, *tables])


def _probe(
    gm: fx.GraphModule, starts: list[fx.Node], generator: torch.Generator, sizes: Sizes
) -> dict[str, Tensor]:
    """Random values of these nodes by label; what one routing gives belongs together."""
    routed: dict[fx.Node, Any] = {}
    found: dict[str, Tensor] = {}
    for node in starts:
        item = Item.match(node)
        if item is None or not calls(item.source, ROUTE_TOKENS):
            found[label(node)] = probe_value(gm, node, generator, sizes)
            continue
        routing = item.source
        if routing not in routed:
            ids = probe_value(gm, operand(routing, 0), generator, sizes)
            routed[routing] = torch.ops.panguq.route_tokens(ids, argument(routing, 1))
        found[label(node)] = routed[routing][item.index]
    return found


def _weight_epsilon(gm: fx.GraphModule) -> float:
    tensors = (get_tensor(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr")
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=2**-23)


def _difference(before: Tensor, after: Tensor) -> float:
    """Largest difference relative to the largest reference value; inf where shapes differ.

    An infinity, as masks hold it, must stay the same infinity; a NaN is always a difference.
    """
    if before.shape != after.shape:
        return math.inf
    finite = before.isfinite()
    if not torch.equal(before[~finite], after[~finite]):
        return math.inf
    before, after = before[finite], after[finite]
    if before.numel() == 0:
        return 0.0
    scale = before.abs().max().item() or 1.0
    worst = (before - after).abs().max().item() / scale
    return worst if math.isfinite(worst) else math.inf


def prove_site(
    before: fx.GraphModule,
    after: fx.GraphModule,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    generator: torch.Generator,
    turned: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    sizes: Sizes = SITE_PROBE_SIZES,
) -> float:
    """Run one rewritten region, named by labels, in both graphs; the largest difference.

    `turned` maps the old value of an input or output to the new one, where they are to differ;
    `sizes` are those of the probe.
    Raises NumericsError, naming the first output that differs, beyond the stated tolerance.
    """

    def turn(name: str, value: Tensor) -> Tensor:
        return turned[name](value) if turned and name in turned else value

    starts = [find_label(before, name) for name in inputs]
    probe = _probe(before, starts, generator, sizes)
    sizes_before, sizes_after = probed_sizes(before, sizes), probed_sizes(after, sizes)
    old = run_in_float64(
        before,
        {**sizes_before, **{n: probe[label(n)] for n in starts}},
        [find_label(before, name) for name in outputs],
    )
    given = {**sizes_after, **{find_label(after, name): turn(name, probe[name]) for name in inputs}}
    ends = [find_label(after, name) for name in outputs]
    wanted = [turn(name, value) for name, value in zip(outputs, old.values(), strict=True)]
    return _judge(before, after, given, ends, wanted)


def prove_whole(before: fx.GraphModule, after: fx.GraphModule, generator: torch.Generator) -> float:
    """Run both graphs on one probe; the largest difference over all values they share by name.

    Raises NumericsError, naming the first node that differs, beyond the stated tolerance.
    """
    new_nodes = {n.name: n for n in after.graph.nodes if n.op == "call_function"}
    shared = [
        n for n in before.graph.nodes if n.name in new_nodes and isinstance(n.meta["val"], Tensor)
    ]
    ends_before, ends_after = _results(before), _results(after)
    probe = {
        str(n.target): probe_value(before, n, generator, PROBE_SIZES)
        for n in before.graph.nodes
        if n.op == "placeholder"
    }
    old = run_in_float64(before, _by_name(before, probe), [*shared, *ends_before])
    ends = [*(new_nodes[n.name] for n in shared), *ends_after]
    wanted = [old[n] for n in (*shared, *ends_before)]
    return _judge(before, after, _by_name(after, probe), ends, wanted)


def _judge(
    before: fx.GraphModule,
    after: fx.GraphModule,
    given: Mapping[fx.Node, Tensor],
    ends: list[fx.Node],
    wanted: list[Tensor],
) -> float:
    """The largest difference of `ends` of `after`, computed from `given`, from the `wanted`."""
    new = run_in_float64(after, given, ends)
    bound = TOLERANCE_IN_EPSILONS * _weight_epsilon(after)
    steps: list[float] | None = None
    worst = 0.0
    for index, (node, x) in enumerate(zip(ends, wanted, strict=True)):
        difference = _difference(_wide(x), _wide(new[node]))
        worst = max(worst, difference)
        if difference <= bound:
            continue
        if not x.isfinite().all():  # no fault of the rewrite
            for weight, tensor in weights_of(before).items():
                ensure_finite(weight, tensor)
        steps = steps or _step_effects(before, after, given, [new[end] for end in ends], ends)
        explained = bound + TOLERANCE_IN_STEPS * steps[index]
        if difference > explained:
            raise NumericsError(
                f"{label(node)} changed by {difference:.3g} of its largest value in float64; "
                f"rounding explains at most {explained:.3g}",
                "the rewrite is not exact: this is a defect of the pass, please report it",
            )
    return worst


def _step_effects(
    before: fx.GraphModule,
    after: fx.GraphModule,
    given: Mapping[fx.Node, Tensor],
    new: list[Tensor],
    ends: list[fx.Node],
) -> list[float]:
    """How far the `ends`, now `new`, move if every rewritten subnormal weight moves by a step.

    Below the smallest normal number of a dtype the step between two numbers is always the same, so
    that a weight of five steps is rounded by a tenth of itself.
    """
    known = weights_of(before)
    generator = torch.Generator().manual_seed(0)

    def moved(gm: fx.GraphModule, name: str) -> Tensor:
        weight: Tensor = get_tensor(gm, name)
        if not weight.is_floating_point() or known.get(name) is weight:
            return weight
        weight = materialized(weight)
        limits = torch.finfo(weight.dtype)
        step = limits.smallest_normal * limits.eps
        sign = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8) * 2 - 1
        return torch.where(weight.abs() < limits.smallest_normal, weight + sign * step, weight)

    there = run_in_float64(after, given, ends, moved)
    values = zip(new, (there[end] for end in ends), strict=True)
    return [_difference(_wide(x), _wide(y)) for x, y in values]


def _results(gm: fx.GraphModule) -> list[fx.Node]:
    return results_of(gm)


def _by_name(gm: fx.GraphModule, probe: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
    return {n: probe[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder"}


def probed_sizes(gm: fx.GraphModule, sizes: Sizes) -> dict[fx.Node, Any]:
    """Values of the nodes that read a dynamic size, so that a region needs no inputs for them."""
    return {
        n: probe_size(gm, n.meta["val"], sizes)
        for n in gm.graph.nodes
        if n.op == "call_function" and isinstance(n.meta["val"], torch.SymInt)
    }
