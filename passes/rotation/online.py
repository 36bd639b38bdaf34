"""Rotations that the graph computes: two small matmuls on the last dim of a matmul's input."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.ir.analysis.rotations import RotationSite
from panguq.ir.call_arguments import operand
from panguq.ir.edit import ancestors, call, tensor_node
from panguq.ir.node_meta import is_quantized
from panguq.ir.views import Linear
from panguq.passes.pipeline.base import PassResult, matmuls
from panguq.passes.rotation.matrices import Rotation, random_rotation

aten = torch.ops.aten
panguq = torch.ops.panguq

ONLINE_KINDS = ("down", "heads")
ACTIVATIONS = (
    panguq.swiglu.default,
    panguq.geglu.default,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
)
MOVES = (aten.reshape.default, aten.view.default, aten.clone.default, aten.to.dtype)


@dataclass(frozen=True, eq=False)
class OnlineSite:
    """A value x that these linears are to read rotated.

    `drawn` is the orthogonal matrix as it was drawn, for heads of the size of their number,
    `rotation` what the graph and the weights get of it, `stem` names the stored factors.
    """

    kind: str
    x: fx.Node
    linears: tuple[fx.Node, ...]
    drawn: Rotation
    rotation: OnlineRotation
    stem: str

    def insert(self) -> None:
        """Let the linears read the rotated x."""
        rotated = self.rotation.insert(self.linears[0], self.x, self.stem)
        for linear in self.linears:
            linear.update_arg(0, rotated)


def find_online_sites(
    gm: fx.GraphModule,
    found: Sequence[RotationSite],
    kinds: Sequence[str],
    generator: torch.Generator,
    result: PassResult,
) -> list[OnlineSite]:
    """Inputs of quantized linears that only the graph itself can rotate, by data flow.

    `heads`: what `found` says to be an attention's result, rotated across its heads.
    `down`: a pointwise product or activation, rotated as a whole. Equal sizes share one matrix.
    """
    heads = {r: s.block for s in found if s.kind == "value" for r in s.readers}
    by_input: dict[tuple[fx.Node, str, int], list[fx.Node]] = defaultdict(list)
    for linear in matmuls(gm):
        x, k = Linear.of(linear).input, Linear.of(linear).shape[1]
        kind, runs = ("heads", k // heads[linear]) if linear in heads else ("down", k)
        if kind not in kinds or (kind == "down" and not _is_pointwise(x)):
            continue
        if not is_quantized(linear):
            result.skip(linear, "it is not quantized, so its input is not rotated online")
        elif runs == 1:
            result.skip(linear, "its input has one head")
        else:
            by_input[x, kind, runs].append(linear)
    matrices: dict[str, tuple[Rotation, OnlineRotation]] = {}
    chosen = []
    for (x, kind, runs), readers in by_input.items():
        val = x.meta["val"]
        k = int(val.shape[-1])
        stem = f"rotate.{kind}_{runs}_{k}_{str(val.dtype).removeprefix('torch.')}"
        if stem not in matrices:
            drawn = random_rotation(runs, generator)
            matrices[stem] = (drawn, OnlineRotation.of(_spread(drawn, k), val.dtype))
        chosen.append(OnlineSite(kind, x, tuple(readers), *matrices[stem], stem))
    return chosen


def _spread(rotation: Rotation, k: int) -> Rotation:
    """The rotation of k numbers that are `rotation.size` runs, alike for each place in a run."""
    if rotation.size == k:
        return rotation
    identity = torch.eye(k // rotation.size, dtype=torch.float64)
    return Rotation(rotation.dense(), identity, rotation.how)


def _is_pointwise(x: fx.Node) -> bool:
    """Whether x is an activation function's result, or a product of two activations."""
    while x.target in MOVES:
        x = operand(x, 0)
    return x.target in ACTIVATIONS or (
        x.target is aten.mul.Tensor
        and all(isinstance(f, fx.Node) and _is_activation(f, x) for f in x.args)
    )


def _is_activation(factor: fx.Node, product: fx.Node) -> bool:
    """Whether this factor comes from the graph's inputs and has a number for each channel."""
    val = factor.meta["val"]
    sized = isinstance(val, torch.Tensor) and val.shape[-1:] == product.meta["val"].shape[-1:]
    return sized and any(n.op == "placeholder" for n in ancestors([factor]))


@dataclass(frozen=True, eq=False)
class OnlineRotation:
    """`x ─► x (left ⊗ right)` for x `[..., a * b]`, computed as `left^T X right` on X `[a, b]`.

    The factors are stored in x's dtype: multiples of the orthogonal ones by powers of two near
    sqrt(a) and sqrt(b), which makes 1 and -1 of a Hadamard matrix's entries up to such a power, so
    that nothing is rounded. None stands for the identity. `weights` is the inverse transpose of
    what is stored, for the columns of the weight that reads the result.
    """

    left: Tensor | None
    right: Tensor | None
    weights: Rotation

    @staticmethod
    def of(rotation: Rotation, dtype: torch.dtype) -> OnlineRotation:
        """The rotation as a graph of this dtype computes it."""
        stored = [_storable(factor).to(dtype) for factor in (rotation.left, rotation.right)]
        inverse = [torch.linalg.inv(factor.double()).T for factor in stored]
        left, right = (None if _is_identity(factor) else factor for factor in stored)
        return OnlineRotation(left, right, Rotation(inverse[0], inverse[1], rotation.how))

    def insert(self, before: fx.Node, x: fx.Node, stem: str) -> fx.Node:
        """Compute the rotated x in front of `before`; the factors are stored under `stem`."""
        sizes = _leading_sizes(before, x)
        split = [len(self.weights.left), len(self.weights.right)]
        shape = [*sizes, *split]
        runs = call(before, aten.reshape.default, (x, shape), origin=x, suffix=".runs")
        if self.right is not None:
            factors = (runs, _stored(before, f"{stem}_right", self.right))
            runs = call(before, aten.matmul.default, factors, origin=x, suffix=".runs_right")
        if self.left is not None:
            factors = (_stored(before, f"{stem}_left", self.left.T.contiguous()), runs)
            runs = call(before, aten.matmul.default, factors, origin=x, suffix=".runs_left")
        shape = [*sizes, math.prod(split)]
        return call(before, aten.reshape.default, (runs, shape), origin=x, suffix=".rotated")


def _storable(orthogonal: Tensor) -> Tensor:
    """Times sqrt(n) / 2^r: entries of a Hadamard matrix become 2^-r, exact in every dtype."""
    size = len(orthogonal)
    if _is_identity(orthogonal):
        return orthogonal
    scaled = orthogonal * math.sqrt(size)
    entries = scaled.round()
    if float((entries - scaled).abs().max()) < 1e-9:
        scaled = entries
    return scaled * 2.0 ** -round(math.log2(size) / 2)


def _is_identity(matrix: Tensor) -> bool:
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))


def _stored(before: fx.Node, name: str, factor: Tensor) -> fx.Node:
    """The node that reads this factor, shared by all that use it: it stands before all calls."""
    graph = before.graph
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == name:
            return node
    first = next(n for n in graph.nodes if n.op == "call_function")
    return tensor_node(first, name, factor)


def _leading_sizes(before: fx.Node, x: fx.Node) -> list[int | fx.Node]:
    """All sizes of x but the last; a node for each that is dynamic."""
    sizes: list[int | fx.Node] = []
    for dim, size in enumerate(x.meta["val"].shape[:-1]):
        if isinstance(size, torch.SymInt):
            suffix = f".size_{dim}"
            sizes.append(call(before, aten.sym_size.int, (x, dim), origin=x, suffix=suffix))
        else:
            sizes.append(int(size))
    return sizes
