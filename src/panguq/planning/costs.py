"""What a compile is expected to cost. Estimates: of the right order, not promises.

The constants were fitted to compiles of a Llama of 135M parameters on one thread of an AMD EPYC
(Zen 4) with PyTorch 2.13; nothing but what the dry run prints depends on them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx

from panguq.ir.call_arguments import arguments
from panguq.ir.edit import module_path
from panguq.ir.node_meta import is_quantized, scheme_of, weight_spec_of
from panguq.ir.run.reroute import routing_of
from panguq.ir.views import ExpertLinear, Linear
from panguq.lowering.cpu.target import CPU
from panguq.passes.codes.solve_weights import SolveWeights
from panguq.passes.pipeline.base import Pass, matmuls
from panguq.passes.quantize_weights import QuantizeWeights
from panguq.tensors.nameless import LARGE_BYTES

_PROCESS_BYTES = 350 << 20  # Python, torch and transformers, loaded and idle
_NODE_BYTES = 400  # of a saved graph's text, for each node and stage
_ALLOCATOR_BYTES = 768 << 20  # freed, and kept by the C library for the next use
_FLOAT64_S_PER_WEIGHT = 20e-9  # one exact pass, proved in float64
_QUANTIZE_S_PER_WEIGHT = 5e-9
_CLIP_RATIO_S_PER_WEIGHT = 3e-9  # for each ratio of a clip search
_OBSERVED_SLOWDOWN = 1.4  # a calibration sweep against its matmuls alone


def weight_bytes(gm: fx.GraphModule) -> int:
    """The traced model's weights as they are, each once."""
    return sum(_bytes(value) for value in _weights(gm).values())


def disk_bytes(gm: fx.GraphModule) -> int:
    """Size of the saved model: codes, scales and zero points; other weights as they are; graphs.

    8-bit codes take a byte and 4-bit codes half a byte a weight; a scale takes 4 bytes and so
    does a zero point, for each output or group. A weight that something else reads too (tied
    embeddings) is stored for it as well.
    """
    values = _weights(gm)
    total = 2 * _NODE_BYTES * len(gm.graph.nodes)
    readers: dict[str, set[fx.Node]] = {name: set() for name in values}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)].update(node.users)
    for name, value in values.items():
        quantized = [n for n in readers[name] if _is_quantized(n, name)]
        total += sum(_code_bytes(node) for node in quantized)
        if len(quantized) < len(readers[name]):
            total += _bytes(value)
    return total


def temporary_bytes(gm: fx.GraphModule, passes: Sequence[Pass], merged: Collection[str]) -> int:
    """What a compile of a folder writes beside the result, and is gone with it.

    The weights named in `merged`, which are merged while the folder is read; the codes, a byte a
    weight, that a pass of GPTQ's family keeps as parts; and twice the experts' weights of one
    layer, as they are computed, where a matmul's take 256 MiB or more.
    """
    values = _weights(gm)
    total = sum(_bytes(value) for name, value in values.items() if name in merged)
    if any(isinstance(step, SolveWeights) for step in passes):
        total += sum(_size(node) for node in matmuls(gm) if not scheme_of(node).is_float)
    layers: dict[str, int] = {}
    for node in matmuls(gm):
        size = _bytes(Linear.of(node).weight.meta["val"])
        if _experts_of(node) is not None and size >= LARGE_BYTES:
            layer = module_path(node).rpartition(".")[0]
            layers[layer] = layers.get(layer, 0) + 2 * size
    return total + max(layers.values(), default=0)


def peak_bytes(gm: fx.GraphModule, windows: int, window: int, passes: Sequence[Pass] = ()) -> int:
    """Peak memory that is not backed by files, for weights that are memory-mapped.

    The process itself + what its allocator keeps + a float64 copy of the largest weight (the
    proofs of exact passes, which take one expert at a time) + one value as wide as the widest
    matmul input for all calibration tokens + six as wide as the widest output for one window.
    Of a mixture of experts, too: those of one matmul in float32 while they are quantized, unless
    their weights take 256 MiB or more, which lie in files. For passes of GPTQ's family, four
    float64 matrices of the widest input.
    """
    stacked = {e.weight_name: e.weight.meta["val"] for e in map(_experts_of, matmuls(gm)) if e}
    largest = max(
        (
            value.numel() // (value.shape[0] if name in stacked else 1)
            for name, value in _weights(gm).items()
        ),
        default=0,
    )
    held = 4 * max(
        (value.numel() for value in stacked.values() if _bytes(value) < LARGE_BYTES), default=0
    )
    quantized = [node for node in matmuls(gm) if not scheme_of(node).is_float]
    shapes = [Linear.of(node).shape for node in quantized]
    widest = max((n for n, _ in shapes), default=0)
    stream = max((k for _, k in shapes), default=0)
    activations = 4 * (windows * window * stream + 6 * window * widest)
    moments = 4 * 8 * stream**2 if any(isinstance(step, SolveWeights) for step in passes) else 0
    return _PROCESS_BYTES + _ALLOCATOR_BYTES + 8 * largest + held + activations + moments


def compile_seconds(gm: fx.GraphModule, passes: Sequence[Pass], tokens: int) -> float:
    """Seconds after the trace, on one thread.

    For each sweep that the passes count over the calibration data: tokens · weights of the matmuls
    at the target's float speed, times 1.4; of an expert the tokens that it gets if all get as many.
    For each exact pass: a float64
    run of all weights. Quantizing: a constant for each weight, and another for each ratio of a clip
    search; passes of GPTQ's family also form X^T X, factor it and work through the columns.
    """
    quantized = sum(_size(n) for n in matmuls(gm) if not scheme_of(n).is_float)
    weights = sum(_size(n) for n in matmuls(gm))
    sweeps = sum(p.sweeps for p in passes) if quantized else 0.0
    ratios = sum(p.steps for p in passes if isinstance(p, QuantizeWeights) and p.clip_search)
    mac_per_s = CPU.kernels["linear"].gmac_per_s * 1e9
    reached = sum(_size(n) * _reach(n) for n in matmuls(gm) if not scheme_of(n).is_float)
    sweep_s = tokens * reached / mac_per_s
    solvers = sum(isinstance(p, SolveWeights) for p in passes)
    return (
        sweeps * _OBSERVED_SLOWDOWN * sweep_s
        + sum(p.exact for p in passes) * _FLOAT64_S_PER_WEIGHT * weights
        + (_QUANTIZE_S_PER_WEIGHT + ratios * _CLIP_RATIO_S_PER_WEIGHT) * quantized
        + solvers * _solving_macs(gm, tokens) / mac_per_s
    )


def _solving_macs(gm: fx.GraphModule, tokens: int) -> float:
    """tokens k^2 for the second moments and k^3 for the factor of each value, n k^2 a weight.

    The factor is float64 and the column loop runs at a quarter of a large product's speed.
    """
    quantized = [node for node in matmuls(gm) if not scheme_of(node).is_float]
    inputs = {Linear.of(node).input: node for node in quantized}
    moments = 0.0
    for node in inputs.values():
        _, k = Linear.of(node).shape
        moments += _matrices(node) * (_reach(node) * tokens * k**2 + 2 * k**3)
    return moments + sum(4 * _size(node) * Linear.of(node).shape[1] for node in quantized)


def _experts_of(node: fx.Node) -> ExpertLinear | None:
    view = Linear.of(node)
    return view if isinstance(view, ExpertLinear) else None


def _matrices(node: fx.Node) -> int:
    """How many weights a matmul has: one, or one an expert."""
    experts = _experts_of(node)
    return 1 if experts is None else experts.experts


def _reach(node: fx.Node) -> float:
    """The share of all tokens that meet one weight of a matmul, if all experts get as many."""
    experts = _experts_of(node)
    if experts is None:
        return 1.0
    top_k = int(arguments(routing_of(node))["expert_ids"].meta["val"].shape[1])
    return min(1.0, top_k / experts.experts)


def _weights(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {str(n.target): n.meta["val"] for n in gm.graph.nodes if n.op == "get_attr"}


def _bytes(value: torch.Tensor) -> int:
    return int(value.numel()) * value.element_size()


def _size(node: fx.Node) -> int:
    """Its weights, those of all experts where it is theirs."""
    return int(Linear.of(node).weight.meta["val"].numel())


def _is_quantized(node: fx.Node, weight: str) -> bool:
    return is_quantized(node) and Linear.of(node).weight_name == weight


def _code_bytes(node: fx.Node) -> int:
    weight = weight_spec_of(node)
    size, k = _size(node), Linear.of(node).shape[1]
    scales = size // weight.group_size_for(k)
    return size * weight.bits // 8 + scales * 4 * (1 if weight.symmetric else 2)
