"""What a served model keeps on a card: weights, the cache of keys and values, activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from panguq.forecast.device import Device
from panguq.forecast.sizes import OpenSizes
from panguq.forecast.work import Work
from panguq.ir.interface import Interface
from panguq.ir.views import ExpertLinear, Linear
from panguq.lowering.problem import FLOAT_BYTES, MatmulProblem

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes on one card. `cache_per_token` and `state_per_sequence` are of one sequence, and
    `usable` is what the server takes of the card, None where the card's memory is not known."""

    weights: int
    cache_per_token: float
    state_per_sequence: float
    activations: int
    usable: int | None

    def cache(self, batch: int, tokens: int) -> float:
        """Of `batch` sequences of so many tokens."""
        return batch * (self.cache_per_token * tokens + self.state_per_sequence)

    def needed(self, batch: int, tokens: int) -> float:
        """All of it."""
        return self.weights + self.activations + self.cache(batch, tokens)

    def largest_batch(self, tokens: int) -> int | None:
        """The most sequences of so many tokens that fit; None where that is not known."""
        if self.usable is None:
            return None
        free, each = self.usable - self.weights - self.activations, self.cache(1, tokens)
        if free < 0:
            return 0
        return int(free // each) if each else None

    def longest(self, batch: int) -> int | None:
        """The most tokens of each of `batch` sequences that fit; None where that is not known."""
        if self.usable is None or not self.cache_per_token:
            return None
        free = self.usable - self.weights - self.activations - batch * self.state_per_sequence
        return max(0, int(free // (batch * self.cache_per_token)))


def cache_bytes(interface: Interface, tensor: int = 1) -> tuple[float, float]:
    """Bytes of a token, and of a sequence whatever its length, in all layers on one card."""
    token = fixed = 0.0
    for cached in interface.cached_tensors():
        sizes = [size for size in cached.sizes if size is not None]
        elements = 1.0
        for size in sizes:
            elements *= size
        found = elements * getattr(torch, cached.dtype).itemsize / tensor
        if cached.grows:
            token += found
        else:
            fixed += found
    return token, fixed


def activation_bytes(work: Work, device: Device, sizes: OpenSizes) -> int:
    """The most that is alive at once in a step: the widest matmul's input and result, and twice
    the stream that layers add to."""
    size = FLOAT_BYTES[work.matmuls[0].problem.dtype]
    widest = stream = 0
    for matmul in work.matmuls:
        problem = device.cards.problem(matmul)
        rows = matmul.tokens(sizes) * problem.top_k
        widest = max(widest, rows * (problem.n + problem.k))
        if matmul.side == "rows":
            stream = max(stream, matmul.tokens(sizes) * problem.n)
    return size * (widest + 2 * stream)


def card_weight_bytes(
    gm: fx.GraphModule, work: Work, device: Device, as_float: bool = False
) -> int:
    """Codes and scales of quantized matmuls on one card; everything else in the model's dtype.

    A weight that something else reads, too (tied embeddings), is stored for that as well. Cards
    divide the weights of matmuls; each has all others.
    """
    size = FLOAT_BYTES[work.matmuls[0].problem.dtype]
    problem_of = {
        part: device.settled(matmul, as_float).problem
        for matmul in work.matmuls
        for part in matmul.parts
    }
    kept: dict[str, float] = {}
    total = 0.0
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        value = node.meta["val"]
        stored = int(value.numel()) * (size if value.is_floating_point() else value.itemsize)
        for user in node.users:
            is_weight = user in problem_of and Linear.of(user).weight is node
            if is_weight and not problem_of[user].scheme.is_float:
                total += _code_bytes(user, problem_of[user], size) / device.cards.tensor
            else:
                kept[str(node.target)] = stored / (device.cards.tensor if is_weight else 1)
    return int(total + sum(kept.values()))


def _code_bytes(node: fx.Node, problem: MatmulProblem, size: int) -> float:
    weight = problem.scheme.weight
    assert weight is not None
    n, k = Linear.of(node).shape
    experts = ExpertLinear.match(node)
    outputs = n * (experts.experts if experts else 1)
    scales = outputs * (k // weight.group_size_for(k))
    per_scale = size if problem.scheme.activation is None else FLOAT_BYTES["float32"]
    return outputs * k * weight.bits / 8 + scales * per_scale * (1 if weight.symmetric else 2)
