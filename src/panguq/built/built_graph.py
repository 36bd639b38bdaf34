"""A graph that runs with its parts' compiled code, which a folder of the cache holds."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from panguq.built.bodies import bodies
from panguq.built.cache_folder import cache_folder, check_own
from panguq.built.compile_part import ValueLayout
from panguq.built.int8_sums import LIBRARY, load_int8_sums
from panguq.built.machine import machine_text
from panguq.built.parts import (
    GraphPart,
    cut,
    digest,
    is_size,
    part_module,
    stored_tensor,
    values_read,
)
from panguq.data.inputs import takes_empty_mask
from panguq.errors import PanguqError, StorageError
from panguq.ir.call_arguments import argument, operand
from panguq.ir.interface import Interface
from panguq.ir.ops.opset import name_of
from panguq.kernels.cpu.int8_weight_linear import aligned
from panguq.lowering.run.write_into_cache import PAST_LENGTH

logger = logging.getLogger("panguq")
MODES = ("few", "many")
"""One code for decoding, and one for prompts."""
# The compiler's own code for these rounds otherwise; a rotary table is made once a call.
_ROUNDS_OTHERWISE = (torch.ops.aten.cos.default, torch.ops.aten.sin.default)
_INT4 = "panguq_cpu.int4_linear.default"
_INT8 = "panguq_cpu.int8_linear.default"
_INT8_WEIGHT = "panguq_cpu.int8_weight_linear.default"
FORMAT = 3


@dataclass(frozen=True)
class BuildPlan:
    """How a prepacked graph is cut, and what its build is called.

    Calls of up to `few` tokens (batch times length) take the code for few, longer ones that for
    many. Where matmuls do not agree up to how many tokens are few, most of the weights decide.
    """

    gm: fx.GraphModule
    interface: Interface
    steps: tuple[GraphPart | fx.Node, ...]
    few: int
    empty_mask: bool

    @staticmethod
    def of(gm: fx.GraphModule, interface: Interface) -> BuildPlan:
        """The plan of a causal language model's prepacked graph."""
        held = {"attention_mask", *interface.inputs[4:]}
        own = bodies(few=True)
        names = {name_of(node.target) for node in gm.graph.nodes}
        # The compiler cannot call its kernel, and a fused sum is slower than that: so a head stays,
        # and only where all matmuls are of this kind they are fused.
        staying = {_INT8_WEIGHT} if names & {_INT4, _INT8} else set()

        def stays(node: fx.Node) -> bool:
            if any(n.op == "placeholder" and n.target in held for n in node.all_input_nodes):
                return True
            if any(n.target == PAST_LENGTH for n in values_read(node) if n.op == "placeholder"):
                return True
            if node.target in _ROUNDS_OTHERWISE:
                return True
            name = str(name_of(node.target))
            return name in staying or (name.startswith("panguq") and node.target not in own)

        return BuildPlan(gm, interface, tuple(cut(gm, stays)), _few(gm), takes_empty_mask(gm))

    @property
    def parts(self) -> list[GraphPart]:
        """What is compiled, in the order in which it runs."""
        return [step for step in self.steps if isinstance(step, GraphPart)]

    def describe(self, node: fx.Node) -> str:
        """What code depends on of a weight; of another value nothing is known before a call."""
        if node.op != "get_attr":
            return "value"
        weight = stored_tensor(self.gm, node)
        return f"{weight.dtype} {list(weight.shape)}"

    @functools.cached_property
    def graph_digest(self) -> str:
        """A name for the graph, whatever its weights hold."""
        lines = [
            step.text(self.describe) if isinstance(step, GraphPart) else str(name_of(step.target))
            for step in self.steps
        ]
        return digest("\n".join([*lines, repr(self.interface.cache), self.interface.float_dtype]))

    @property
    def name(self) -> str:
        """The folder of the build in the cache."""
        return f"{self.graph_digest}-{digest(machine_text())}"


def _few(gm: fx.GraphModule) -> int:
    """Up to how many tokens are few: one where a matmul reads an int8 weight row by row, else the
    weighted median of the limits of the 4-bit ones."""
    limits: list[tuple[int, int]] = []
    for node in gm.graph.nodes:
        if name_of(node.target) == _INT8:
            return 1
        if name_of(node.target) == _INT4 and (limit := int(argument(node, -1))) > 0:
            limits.append((limit, stored_tensor(gm, operand(node, 1)).numel()))
    left = sum(weights for _, weights in limits) / 2
    for limit, weights in sorted(limits):
        left -= weights
        if left <= 0:
            return limit
    return 1


class BuiltGraph:
    """A graph in place of `plan.gm`, called in the same way."""

    def __init__(self, plan: BuildPlan, graphs: Mapping[str, fx.GraphModule]) -> None:
        self.plan = plan
        self.graphs = dict(graphs)

    @torch.compiler.disable
    def __call__(self, *inputs: Any) -> Any:
        """The graph's results, from the code for so many tokens if there is one."""
        few = inputs[0].numel() <= self.plan.few
        return self.graphs["few" if few else "many"](*inputs)


def look_up(gm: fx.GraphModule, interface: Interface) -> BuiltGraph | None:
    """What the cache holds of this graph; None if that is nothing, or nothing that may run here,
    which is said once."""
    try:
        if not cache_folder().is_dir():
            return None
        plan = BuildPlan.of(gm, interface)
        folder = find_build(plan)
        if folder is not None:
            return loaded(plan, folder)
        _say_of_others(plan)
    except PanguqError as error:
        logger.warning("built code is not used, the graph runs uncompiled: %s", error.message)
    return None


def _say_of_others(plan: BuildPlan) -> None:
    try:
        others = [p for p in cache_folder().glob(f"{plan.graph_digest}-*") if p.is_dir()]
    except OSError:
        return
    if others:
        logger.warning(
            "built code is not used, the graph runs uncompiled: it was built on a processor with "
            "other features, or by another release of panguq or torch; build it again"
        )


def find_build(plan: BuildPlan) -> Path | None:
    """The folder of a build that is there and safe. Raises StorageError for one that is not safe,
    None for one that is damaged or not there."""
    folder = cache_folder() / plan.name
    try:
        check_own(folder.parent)
        check_own(folder)
        entries = entries_of(folder)
        for name, wanted in entries["libraries"].items():
            check_own(folder / name)
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != wanted:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder


def entries_of(folder: Path) -> Any:
    """What `built.json` says. Raises OSError, ValueError or KeyError for one that is no build's."""
    check_own(folder / "built.json")
    entries = json.loads((folder / "built.json").read_text(encoding="utf-8"))
    if entries["format"] != FORMAT or set(entries["modes"]) != set(MODES):
        raise ValueError("another format")
    return entries


def loaded(plan: BuildPlan, folder: Path) -> BuiltGraph:
    """The graph with a build's code. Raises StorageError if it does not load."""
    entries = entries_of(folder)
    runners: dict[str, Callable[..., Any]] = {}
    try:
        if LIBRARY in entries["libraries"]:
            load_int8_sums(folder / LIBRARY)
        for name in entries["libraries"].keys() - {LIBRARY}:
            runners[name] = torch._C._aoti.AOTIModelContainerRunnerCpu(str(folder / name), 1).run
    except (RuntimeError, OSError) as error:
        line = str(error).strip().splitlines()[0][:200]
        raise StorageError(
            f"{folder} does not load: {line}", "delete it and build again"
        ) from error
    graphs = {}
    for mode in MODES:
        calls = [
            _call(plan, part, entry, runners)
            for part, entry in zip(plan.parts, entries["modes"][mode], strict=True)
        ]
        graphs[mode] = _joined(plan, calls)
    return BuiltGraph(plan, graphs)


def _call(
    plan: BuildPlan, part: GraphPart, entry: Any, runners: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """A function of the part's inputs alone, which returns its results."""
    weights = [aligned(stored_tensor(plan.gm, node)) for node in part.weights]
    if entry is None:
        module = part_module(part, lambda target: target)
        return lambda *values: module(*values, *weights)
    run = runners[entry["library"]]
    layouts = [ValueLayout(tuple(x["order"]), tuple(x["varying"])) for x in entry["layouts"]]
    bring = [layout.bring for layout in layouts]

    def compiled(*values: Tensor) -> Sequence[Tensor]:
        laid = [place(value) for place, value in zip(bring, values, strict=True)]
        return run(laid + weights)

    return compiled


def _joined(plan: BuildPlan, calls: Sequence[Callable[..., Any]]) -> fx.GraphModule:
    """The graph with a call in place of each part."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> fx.Node:
        for source in node.all_input_nodes:
            if source not in copies and (source.op == "get_attr" or is_size(source)):
                copy(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    nodes = list(plan.gm.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            copy(node)
    of_parts = iter(calls)
    for step in plan.steps:
        if not isinstance(step, GraphPart):
            copy(step)
            continue
        made = graph.call_function(next(of_parts), tuple(copies[n] for n in step.inputs))
        for index, node in enumerate(step.results):
            copies[node] = graph.call_function(_item, (made, index))
    copy(nodes[-1])
    return fx.GraphModule(plan.gm, graph)


def _item(results: Sequence[Tensor], index: int) -> Tensor:
    return results[index]
