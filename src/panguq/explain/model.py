"""What a whole model is predicted to take, prompt and decoding step, against the float model.

An NPU runs the kernels of one stream one after another, so the predicted time is the sum over all
nodes; the critical path, the longest chain of nodes that wait for each other, is what no number of
streams could undercut. Matmuls cost what `cost/model.py` says, with the kernel that the dispatch
table takes for that number of tokens. Attention costs its multiplications at the cube's full rate
or its traffic, whichever is longer. What else reads or writes tensors costs its traffic at the
memory's rate, without starting a kernel, as most of it is fused into its neighbours; so does
quantizing the input of int8 matmuls, once for all that read it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import numpy as np
from torch import Tensor, fx

from panguq.errors import LoweringError
from panguq.forecast.sizes import OpenSizes, tensor_inputs
from panguq.ir.edit import label, module_path, op_name
from panguq.ir.interface import Interface
from panguq.ir.node_meta import scheme_of
from panguq.ir.quant_spec import SCHEMES
from panguq.ir.views import Linear
from panguq.lowering.choice import Choice
from panguq.lowering.graph_problems import matmul_problem
from panguq.lowering.problem import FLOAT_BYTES, Dtype, MatmulProblem, WeightFormat
from panguq.lowering.select_kernel import scheme_refusal, select_kernel
from panguq.lowering.target import Peaks, Target

_MOVES_NOTHING = {"reshape", "transpose", "view", "unsqueeze", "squeeze", "sym_size", "expand"}


@dataclass(frozen=True)
class Matmuls:
    """All matmuls of one shape and scheme. Times are microseconds of one of them."""

    n: int
    k: int
    scheme: str
    count: int
    example: str
    prefill_kernel: str
    decode_kernel: str
    prefill_us: float
    decode_us: float
    float_prefill_us: float
    float_decode_us: float
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """A prompt or a decoding step, in microseconds."""

    tokens: int
    us: float
    float_us: float
    critical_path_us: float
    critical_path: tuple[str, ...]  # matmuls and attention on it, layer by layer
    other_us: float  # what is not matmuls

    @property
    def gain(self) -> float:
        """How many times faster than the float model."""
        return self.float_us / self.us


@dataclass(frozen=True)
class ModelExplanation:
    """Predictions for a model; bytes are those of weights, scales included."""

    target: str
    scheme: str
    dtype: Dtype
    batch: int
    weight_format: WeightFormat
    matmuls: tuple[Matmuls, ...]
    prefill: Phase
    decode: Phase
    weight_bytes: int
    float_weight_bytes: int


def explain_model(
    gm: fx.GraphModule,
    interface: Interface,
    target: Target,
    dtype: Dtype,
    scheme: str,
    prompt: int = 1024,
    batch: int = 1,
    allow_float: bool = False,
    weight_format: WeightFormat = "ND",
) -> ModelExplanation:
    """Predict a canonical graph whose linears have schemes.

    A prompt has `prompt` tokens for each of `batch` sequences; a decoding step has one for each,
    and `prompt` in the cache. Only the last position's logits are computed. Raises LoweringError
    if the target has no kernel for a scheme, not even for its fallbacks, and if it says nothing
    of what is no matmul.
    """
    if target.peaks is None:
        raise LoweringError(f"target {target.name} does not predict whole models")
    chosen = _choices(gm, target, dtype, allow_float, weight_format)
    phases, times = [], []
    for seq, past in ((prompt, 0), (1, prompt)):
        sizes = {"batch": batch, "seq": seq, "past": past, "kept": 1}
        phase, matmul_us = _phase(gm, interface, chosen, target, dtype, sizes)
        phases.append(phase)
        times.append(matmul_us)
    return ModelExplanation(
        target=target.name,
        scheme=scheme,
        dtype=dtype,
        batch=batch,
        weight_format=weight_format,
        matmuls=tuple(_grouped(chosen, times[0], times[1])),
        prefill=phases[0],
        decode=phases[1],
        weight_bytes=_weight_bytes(gm, chosen, dtype),
        float_weight_bytes=_weight_bytes(gm, {}, dtype),
    )


@dataclass(frozen=True)
class _Chosen:
    problem: MatmulProblem
    choice: Choice
    float_choice: Choice
    note: str


def _choices(
    gm: fx.GraphModule,
    target: Target,
    dtype: Dtype,
    allow_float: bool,
    weight_format: WeightFormat,
) -> dict[fx.Node, _Chosen]:
    """The kernels of every linear; matmuls of one shape and scheme are decided once."""
    known: dict[MatmulProblem, _Chosen] = {}
    result = {}
    for node in gm.graph.nodes:
        linear = Linear.match(node)
        if linear is None:
            continue
        # a weight that is computed, as a router's cast to float32, is never quantized
        scheme = scheme_of(node) if linear.is_stored else SCHEMES["FLOAT"]
        problem = matmul_problem(node, scheme)
        problem = replace(problem, dtype=dtype, weight_format=weight_format)
        if problem not in known:
            known[problem] = _choose(problem, target, allow_float)
        result[node] = known[problem]
    return result


def _choose(problem: MatmulProblem, target: Target, allow_float: bool) -> _Chosen:
    note, wanted = "", problem.scheme
    refusal = None if wanted.is_float else scheme_refusal(problem, target)
    for scheme in target.fallbacks(wanted) if refusal else ():
        problem = replace(problem, scheme=scheme)
        note = f"{wanted.name} refused: {refusal}"
        if scheme_refusal(problem, target) is None:
            break
    plain = replace(problem, scheme=SCHEMES["FLOAT"])
    choice = select_kernel(problem, target, allow_float=allow_float)
    return _Chosen(problem, choice, select_kernel(plain, target), note)


def _phase(
    gm: fx.GraphModule,
    interface: Interface,
    chosen: Mapping[fx.Node, _Chosen],
    target: Target,
    dtype: Dtype,
    sizes: Mapping[str, int],
) -> tuple[Phase, dict[fx.Node, tuple[float, float, str]]]:
    values, peaks = OpenSizes(gm, interface, sizes), target.peaks
    assert peaks is not None  # `explain_model` has looked
    compute = [n for n in gm.graph.nodes if n.op == "call_function"]
    cost = dict.fromkeys(compute, 0.0)
    plain = dict.fromkeys(compute, 0.0)
    matmul_us: dict[fx.Node, tuple[float, float, str]] = {}
    quantized: set[fx.Node] = set()
    costs: dict[tuple[MatmulProblem, int], tuple[float, float, str]] = {}
    for node in compute:
        if node not in chosen:
            cost[node] = plain[node] = _other_us(node, peaks, values, dtype)
            continue
        entry = chosen[node]
        x = Linear.of(node).input
        m = int(np.prod(values.shape(x)[:-1])) // entry.problem.top_k
        key = (entry.problem, m)
        if key not in costs:
            costs[key] = _matmul_us(entry, target, m)
        matmul_us[node] = costs[key]
        cost[node], plain[node] = costs[key][:2]
        if entry.choice.storage != "float" and entry.problem.scheme.activation is not None:
            if x not in quantized:
                cost[node] += m * entry.problem.k * (FLOAT_BYTES[dtype] + 1) / peaks.bytes_per_us
            quantized.add(x)
    path = _critical_path(compute, cost)
    total = sum(cost.values())
    matmuls = sum(us for us, _, _ in matmul_us.values())
    phase = Phase(
        tokens=sizes["batch"] * sizes["seq"],
        us=total,
        float_us=sum(plain.values()),
        critical_path_us=sum(cost[node] for node in path),
        critical_path=tuple(label(n) for n in path if cost[n] > 0.01 * total or n in chosen),
        other_us=total - matmuls,
    )
    return phase, matmul_us


def _matmul_us(entry: _Chosen, target: Target, m: int) -> tuple[float, float, str]:
    found = []
    for choice, problem in (
        (entry.choice, entry.problem),
        (entry.float_choice, replace(entry.problem, scheme=SCHEMES["FLOAT"])),
    ):
        candidate = next(e.candidate for e in choice.table if e.last_m is None or m <= e.last_m)
        us = float(target.total_us([candidate], problem, np.array([m]))[0, 0])
        found.append((us, str(candidate)))
    return found[0][0], found[1][0], found[0][1]


def _other_us(node: fx.Node, peaks: Peaks, values: OpenSizes, dtype: Dtype) -> float:
    name = op_name(node).partition(".")[0]
    if name in _MOVES_NOTHING or not isinstance(node.meta.get("val"), Tensor):
        return 0.0
    inputs = tensor_inputs(node)
    elements = [values.count(n) for n in (*inputs, node)]
    if name == "embedding":
        elements = [values.count(node)] * 2
    traffic_us = sum(elements) * FLOAT_BYTES[dtype] / peaks.bytes_per_us
    if name != "attention":
        return traffic_us
    query, key = (values.shape(n) for n in inputs[:2])
    macs = 2 * int(np.prod(query)) * key[-2]
    causal = 0.5 if query[-2] > 1 else 1.0
    return max(traffic_us, causal * macs / peaks.macs_per_us)


def _critical_path(compute: Iterable[fx.Node], cost: Mapping[fx.Node, float]) -> list[fx.Node]:
    """The chain of nodes, each waiting for the one before, that takes longest."""
    graph: Any = nx.DiGraph()
    nodes = list(compute)
    for node in nodes:
        graph.add_node(node)
        for source in node.all_input_nodes:
            if source in cost:
                graph.add_edge(source, node, us=cost[source])
    end = object()  # edges carry the time of where they start, so the last node needs one, too
    for node in nodes:
        graph.add_edge(node, end, us=cost[node])
    path = nx.dag_longest_path(graph, weight="us", default_weight=0.0)
    return [node for node in path if node is not end]


def _grouped(
    chosen: Mapping[fx.Node, _Chosen],
    prefill: Mapping[fx.Node, tuple[float, float, str]],
    decode: Mapping[fx.Node, tuple[float, float, str]],
) -> list[Matmuls]:
    groups: dict[tuple[int, int, str, int], list[fx.Node]] = defaultdict(list)
    for node, entry in chosen.items():
        scheme = "FLOAT" if entry.choice.storage == "float" else entry.problem.scheme.name
        groups[entry.problem.n, entry.problem.k, scheme, entry.problem.experts].append(node)
    rows = []
    for (n, k, scheme, _), nodes in groups.items():
        first = nodes[0]
        rows.append(
            Matmuls(
                n=n,
                k=k,
                scheme=scheme,
                count=len(nodes),
                example=module_path(first) or label(first),
                prefill_kernel=prefill[first][2],
                decode_kernel=decode[first][2],
                prefill_us=prefill[first][0],
                decode_us=decode[first][0],
                float_prefill_us=prefill[first][1],
                float_decode_us=decode[first][1],
                note=chosen[first].note,
            )
        )
    return rows


def _weight_bytes(gm: fx.GraphModule, chosen: Mapping[fx.Node, _Chosen], dtype: Dtype) -> int:
    """Codes and scales of quantized matmuls; everything else in the model's dtype, once."""
    size, total, kept = FLOAT_BYTES[dtype], 0, set()
    quantized: dict[str, _Chosen] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        for user in node.users:
            entry = chosen.get(user)
            is_weight = entry is not None and Linear.of(user).weight is node
            if entry is not None and is_weight and entry.choice.storage != "float":
                quantized[name] = entry
            else:
                kept.add(name)
    for node in gm.graph.nodes:
        if node.op == "get_attr" and str(node.target) in kept:
            kept.discard(str(node.target))
            value = node.meta["val"]
            total += int(value.numel()) * (size if value.is_floating_point() else value.itemsize)
    for entry in quantized.values():
        problem, weight = entry.problem, entry.problem.scheme.weight
        assert weight is not None
        outputs = problem.n * max(problem.experts, 1)
        scales = outputs * (problem.k // problem.group_size)
        per_scale = size if problem.scheme.activation is None else FLOAT_BYTES["float32"]
        total += outputs * problem.k * weight.bits // 8
        total += scales * per_scale * (1 if weight.symmetric else 2)
    return total
