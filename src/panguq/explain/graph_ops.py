"""Every op of a compiled model priced, for a prompt and for a decoding step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from panguq.compiled_module import CompiledModule
from panguq.errors import LoweringError
from panguq.forecast.sizes import OpenSizes
from panguq.ir.edit import op_name
from panguq.ir.interface import Interface
from panguq.lowering.ascend.op_times.nodes import node_cost
from panguq.lowering.ascend.op_times.price import machine_of
from panguq.lowering.target import Cost, Target
from panguq.lowering.targets import find_target


@dataclass(frozen=True)
class GraphTimes:
    """Microseconds of all kernels of a lowered graph; `unpriced` says of each op without a price
    why it has none."""

    sizes: Mapping[str, int]
    costs: Mapping[fx.Node, Cost]
    unpriced: Mapping[fx.Node, str]

    @property
    def us(self) -> float:
        """All of them, one after another."""
        return sum(cost.total_us for cost in self.costs.values())

    def by_op(self) -> list[dict[str, Any]]:
        """Calls and microseconds of each op, the dearest first."""
        found: dict[str, list[float]] = defaultdict(list)
        for node, cost in self.costs.items():
            found[op_name(node).partition(".")[0]].append(cost.total_us)
        rows = [{"op": op, "calls": len(us), "us": sum(us)} for op, us in found.items()]
        return sorted(rows, key=lambda row: -float(row["us"]))

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        reasons = sorted(set(self.unpriced.values()))
        return {**self.sizes, "us": self.us, "ops": self.by_op(), "unpriced": reasons}


def graph_times(
    gm: fx.GraphModule, interface: Interface, target: Target, sizes: Mapping[str, int]
) -> GraphTimes:
    """Price every kernel of a graph that was lowered for an Ascend NPU.

    `sizes` are those that the interface leaves open, `{"batch": 1, "seq": 512, "past": 0,
    "kept": 1}`. Raises LoweringError for a target that is none.
    """
    machine, values = machine_of(target), OpenSizes(gm, interface, sizes)
    costs, unpriced = {}, {}
    for node in gm.graph.nodes:
        try:
            found = node_cost(node, values.of, machine)
        except LoweringError as error:
            unpriced[node] = error.message
            continue
        if found is not None:
            costs[node] = found
    return GraphTimes(dict(sizes), costs, unpriced)


def compiled_times(
    model: CompiledModule, target: Target, batch: int, prompt: int
) -> dict[str, GraphTimes]:
    """A prompt's kernels and a decoding step's behind it; an encoder's of one sequence of texts.

    Raises LoweringError for a model that was compiled for another kind of target.
    """
    kind = find_target(model.target).kind if model.target else "none"
    if kind != machine_of(target).kind:
        raise LoweringError(
            f"the model was compiled for {model.target}, and {target.name} is asked for",
            "compile it for an Ascend target of the same chip",
        )
    phases = {"prompt": {"batch": batch, "seq": prompt, "past": 0, "kept": 1}}
    if model.interface.kind == "causal_lm":
        phases["decode"] = {"batch": batch, "seq": 1, "past": prompt, "kept": 1}
    return {
        name: graph_times(model.graph, model.interface, target, sizes)
        for name, sizes in phases.items()
    }


def render(found: Mapping[str, GraphTimes], target: str) -> str:
    """The ops of each phase, the dearest first."""
    lines = []
    for phase, times in found.items():
        sizes = times.sizes
        behind = f" behind {sizes['past']} of the past" if sizes["past"] else ""
        lines += [
            f"{phase} on {target} (predicted): {times.us:.0f} us of kernels, "
            f"{sizes['batch']} x {sizes['seq']} tokens{behind}",
            "",
        ]
        for row in times.by_op():
            each = row["us"] / row["calls"]
            lines.append(f"{row['us']:10.1f} us  {row['calls']:5} x {each:9.1f}  {row['op']}")
        lines += [f"without a price: {reason}" for reason in sorted(set(times.unpriced.values()))]
        lines.append("")
    return "\n".join(lines).rstrip()
