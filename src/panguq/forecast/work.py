"""What one forward of a model is made of, as a server runs it.

Linears that read one value under one scheme are one matmul (q, k and v; gate and up). A norm takes
the addition in front of it along. Keys and values are written to their pages and read from there,
so that the graph's concatenation with the past moves the new tokens alone. Views move nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, fx

from panguq.forecast.sizes import OpenSizes, tensor_inputs
from panguq.ir.edit import label, module_path, op_name
from panguq.ir.interface import Interface
from panguq.ir.node_meta import scheme_of
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.views import ExpertLinear, Linear
from panguq.lowering.graph_problems import matmul_problem
from panguq.lowering.problem import Dtype, MatmulProblem

Side = Literal["columns", "rows"]
_VIEWS = {
    "reshape", "transpose", "view", "unsqueeze", "squeeze", "sym_size", "expand", "slice", "select",
    "split", "split_with_sizes", "chunk", "permute", "getitem", "alias", "detach", "t",
}  # fmt: skip
_CACHE = ("past_key_", "past_value_")


@dataclass(frozen=True)
class MatmulWork:
    """A matmul, of any number of tokens; `side`: how cards divide it, by outputs or by inputs.

    `parts` are the linears that it joins."""

    problem: MatmulProblem
    input: fx.Node
    side: Side
    parts: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """The modules that it joins."""
        return " + ".join(module_path(node) or label(node) for node in self.parts)

    def tokens(self, sizes: OpenSizes) -> int:
        """Rows of the input; of experts those before each is copied for every expert it meets.

        Of latents in a cache only the new ones: a server multiplies queries with the weight."""
        rows = 1
        for size in sizes.shape(self.input)[:-1]:
            rows *= size
        new = sizes.given["batch"] * sizes.given["seq"]
        return min(rows // self.problem.top_k, new) or 1


@dataclass(frozen=True)
class AttentionWork:
    """An attention op: its query, key and value, how far back a token sees (0: to the first)."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    window: int


@dataclass(frozen=True)
class VectorWork:
    """A kernel on vector cores: what it reads and writes. `divided`: each card has a part of it."""

    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]
    divided: bool


@dataclass(frozen=True)
class Work:
    """All kernels of one forward; how many layers there are, and the kernels of one, on average."""

    matmuls: tuple[MatmulWork, ...]
    attentions: tuple[AttentionWork, ...]
    vectors: tuple[VectorWork, ...]
    layers: int
    kernels: int


def work_of(gm: fx.GraphModule, interface: Interface, dtype: Dtype) -> Work:
    """The work of a canonical graph whose linears have schemes."""
    linears = [node for node in gm.graph.nodes if Linear.match(node) is not None]
    inside = {node: _between(Linear.of(node).input) for node in linears}
    divided = {node for between in inside.values() for node in between[0] if between[1]}
    joined: dict[tuple[fx.Node, str, int, Side], list[fx.Node]] = {}
    for node in linears:
        side: Side = "rows" if inside[node][1] else "columns"
        experts = ExpertLinear.match(node)
        alike = (Linear.of(node).input, _scheme(node), experts.experts if experts else 0, side)
        joined.setdefault(alike, []).append(node)
    matmuls = [
        MatmulWork(_problem(parts, dtype), source, side, tuple(parts))
        for (source, _, _, side), parts in joined.items()
    ]
    attentions, vectors = [], []
    inner = sum(_is_in_layer(matmul.parts[0]) for matmul in matmuls)
    for node in gm.graph.nodes:
        if node.op != "call_function" or not isinstance(
            node.meta.get("val"), Tensor | tuple | list
        ):
            continue
        name = op_name(node).partition(".")[0]
        if name in _VIEWS or node in inside:
            continue
        if name == "attention":
            query, key, value = tensor_inputs(node)[:3]
            attentions.append(AttentionWork(query, key, value, _window(key, interface)))
        elif (kernel := _vector(node, name, node in divided)) is not None:
            vectors.append(kernel)
        else:
            continue
        inner += _is_in_layer(node)
    layers = len(interface.cache) or max(len(attentions), 1)
    return Work(tuple(matmuls), tuple(attentions), tuple(vectors), layers, round(inner / layers))


def _is_in_layer(node: fx.Node) -> bool:
    """Whether it comes from a module that is one of a list, such as `model.layers.3.mlp`."""
    return re.search(r"\.[0-9]+[.:]", label(node)) is not None


def _scheme(node: fx.Node) -> str:
    """A weight that is computed, as a router's cast to float32, is never quantized."""
    return scheme_of(node).name if Linear.of(node).is_stored else "FLOAT"


def _problem(parts: list[fx.Node], dtype: Dtype) -> MatmulProblem:
    first = parts[0]
    scheme = scheme_of(first) if Linear.of(first).is_stored else SCHEMES["FLOAT"]
    problem = matmul_problem(first, scheme)
    outputs = sum(Linear.of(node).shape[0] for node in parts)
    return replace(problem, n=outputs, dtype=dtype, own_kernels=False)


def _between(source: fx.Node) -> tuple[set[fx.Node], bool]:
    """The nodes from the last norms and linears to this value, and whether there is a linear among
    what they follow from: then this one multiplies what another's outputs have become, and cards
    divide it by its inputs."""
    seen: set[fx.Node] = set()
    stack, follows = [source], False
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function" or not _is_float(node):
            continue
        if Linear.match(node) is not None:
            follows = True
            continue
        if "norm" in op_name(node):
            continue
        seen.add(node)
        stack.extend(tensor_inputs(node))
    return seen, follows


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point()


def _vector(node: fx.Node, name: str, divided: bool) -> VectorWork | None:
    """The kernel that a node is; None where it is part of the one behind it."""
    reads = [n for n in tensor_inputs(node) if n.op != "get_attr" or name == "embedding"]
    if name == "embedding":
        return VectorWork((node,), (node,), divided)
    if name == "cat" and any(n.name.startswith(_CACHE) for n in reads):
        new = [n for n in reads if not n.name.startswith(_CACHE)]
        return VectorWork(tuple(new), tuple(new), divided)
    if name == "add" and any("norm" in op_name(user) for user in node.users):
        return None
    if "norm" in name and reads and op_name(reads[0]).partition(".")[0] == "add":
        added = reads[0]
        return VectorWork((*tensor_inputs(added), *reads[1:]), (added, node), divided)
    return VectorWork(
        tuple(reads), (node,) if isinstance(node.meta["val"], Tensor) else (), divided
    )


def _window(key: fx.Node, interface: Interface) -> int:
    """The window of the layer whose cache this key continues."""
    for node in _back(key):
        number = node.name.removeprefix("past_key_")
        if node.op == "placeholder" and number.isdigit() and int(number) < len(interface.cache):
            return interface.cache[int(number)].window
    return 0


def _back(node: fx.Node, steps: int = 6) -> Iterable[fx.Node]:
    yield node
    if steps and node.op == "call_function" and Linear.match(node) is None:
        for source in tensor_inputs(node):
            yield from _back(source, steps - 1)
