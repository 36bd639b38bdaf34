"""How well each node of a stage does on its own: fed what an earlier stage computes there.

Errors do not add up this way, and a node that is named is the one at fault. An exact pass is
checked in float64 against the stage before it, a lossy one as it runs against the float graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from panguq.decibels import sqnr_db
from panguq.dumps.files import SiteInfo
from panguq.ir.edit import ancestors, find_label, get_tensor, label
from panguq.ir.run import interpret
from panguq.ir.run.equivalence import TOLERANCE_IN_EPSILONS, run_in_float64


def computed(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that compute something, in graph order."""
    return [node for node in gm.graph.nodes if node.op == "call_function"]


def float_values(gm: fx.GraphModule, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What every node of the float graph computes on the probe, by label."""
    values = interpret.values(gm, probe, computed(gm))
    return {label(n): v for n, v in values.items() if isinstance(v, Tensor)}


def lossy_quality(
    gm: fx.GraphModule, probe: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, float]:
    """SQNR in dB of each node that the float graph has, too, fed the float graph's values.

    In graph order. What a pass put between two such nodes counts to the second: a matmul is
    judged together with the quantization of its input and its weight.
    """
    found: dict[str, float] = {}
    order = [node for node in gm.graph.nodes if node.op != "output"]
    freed = interpret.last_uses(order)
    environment: interpret.Values = {}
    with torch.no_grad():
        for node in order:
            if node.op == "placeholder":
                environment[node] = probe[str(node.target)]
                continue
            value = interpret.compute(gm, node, environment)
            expected = reference.get(label(node)) if node.op == "call_function" else None
            if expected is not None:
                found[label(node)] = _sqnr(expected, value)
                value = expected
            environment[node] = value
            for source in freed.get(node, ()):
                del environment[source]
    return found


def exact_faults(
    before: fx.GraphModule,
    after: fx.GraphModule,
    probes: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    sites: tuple[SiteInfo, ...],
    renamed: Mapping[str, str],
) -> tuple[int, dict[str, float]]:
    """How many nodes an exact pass could have changed, and the SQNR in dB of those it did.

    Inside a site values may change, so only its outputs are compared, fed the site's inputs.
    `probes` are the inputs of the two graphs, and `renamed` maps labels of `after` to `before`.
    """
    old_nodes = {label(n): n for n in before.graph.nodes}
    inside = set().union(*(_inside(gm, site) for gm in (before, after) for site in sites), set())
    pairs = {
        node: old_nodes[renamed.get(label(node), label(node))]
        for node in computed(after)
        if renamed.get(label(node), label(node)) in old_nodes and label(node) not in inside
    }
    pairs = {new: old for new, old in pairs.items() if old.op == "call_function"}
    suspects = [new for new, old in pairs.items() if not _same(before, after, old, new, pairs)]
    if not suspects:
        return 0, {}
    old_values = run_in_float64(before, _inputs(before, probes[0]), list(pairs.values()))
    starts: dict[fx.Node, Any] = _inputs(after, probes[1])
    starts |= {new: old_values[old] for new, old in pairs.items()}
    bound = TOLERANCE_IN_EPSILONS * _epsilon(after)
    faults: dict[str, float] = {}
    for node in suspects:
        expected = starts.pop(node)
        actual = run_in_float64(after, starts, [node])[node]
        starts[node] = expected
        if isinstance(expected, Tensor) and _differs(expected, actual, bound):
            faults[label(node)] = _sqnr(expected, actual)
    return len(suspects), faults


# --- parts --------------------------------------------------------------------------------------


def _sqnr(expected: Tensor, actual: Any) -> float:
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return float("-inf")
    return sqnr_db(*_without_equal_infinities(expected, actual))


def _without_equal_infinities(expected: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros where both hold the same infinity, as masks do: there is nothing to compare."""
    if not expected.is_floating_point() or bool(expected.isfinite().all()):
        return expected, actual
    same = expected.isinf() & (expected == actual)
    return expected.masked_fill(same, 0.0), actual.masked_fill(same, 0.0)


def _differs(expected: Tensor, actual: Any, bound: float) -> bool:
    """By more than rounded weights explain, relative to the largest value, as in a proof."""
    if not isinstance(actual, Tensor) or expected.shape != actual.shape:
        return True
    if not expected.numel():
        return False
    old, new = _without_equal_infinities(expected.double(), actual.double())
    scale = float(old.abs().max()) or 1.0
    return not float((old - new).abs().max()) <= bound * scale


def _epsilon(gm: fx.GraphModule) -> float:
    dtypes = {get_tensor(gm, str(n.target)).dtype for n in gm.graph.nodes if n.op == "get_attr"}
    return max((torch.finfo(d).eps for d in dtypes if d.is_floating_point), default=2**-23)


def _inputs(gm: fx.GraphModule, probe: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
    return {n: probe[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder"}


def _inside(gm: fx.GraphModule, site: SiteInfo) -> set[str]:
    """Labels of what lies between a site's inputs and its outputs."""
    try:
        starts = {find_label(gm, name) for name in site.inputs}
        ends = [find_label(gm, name) for name in site.outputs]
    except KeyError:
        return set()
    needed = ancestors(ends, stop=starts)
    reached = set(starts)
    for node in gm.graph.nodes:
        if node in needed and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return {label(node) for node in reached - starts - set(ends)}


def _same(
    before: fx.GraphModule,
    after: fx.GraphModule,
    old: fx.Node,
    new: fx.Node,
    pairs: Mapping[fx.Node, fx.Node],
) -> bool:
    """Whether a node computes the same from the same values, so that it need not be run."""
    sources = list(zip(old.all_input_nodes, new.all_input_nodes, strict=False))
    if old.target is not new.target or len(old.all_input_nodes) != len(new.all_input_nodes):
        return False
    places = {id(n): i for nodes in zip(*sources, strict=True) for i, n in enumerate(nodes)}
    spelled = [
        repr(fx.map_arg((n.args, n.kwargs), lambda source: f"%{places[id(source)]}"))
        for n in (old, new)
    ]
    return spelled[0] == spelled[1] and all(
        _same_source(before, after, x, y, pairs) for x, y in sources
    )


def _same_source(
    before: fx.GraphModule,
    after: fx.GraphModule,
    old: fx.Node,
    new: fx.Node,
    pairs: Mapping[fx.Node, fx.Node],
) -> bool:
    if old.op != new.op:
        return False
    if new.op == "get_attr":
        return get_tensor(before, str(old.target)) is get_tensor(after, str(new.target))
    return old.target == new.target if new.op == "placeholder" else pairs.get(new) is old
