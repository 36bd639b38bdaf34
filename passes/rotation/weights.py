"""Let stored weights take up rotations: products in float64, rounded once to the weight's dtype."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.errors import NumericsError
from panguq.ir.analysis.rotations import Turn
from panguq.ir.canonical_views import RmsNorm
from panguq.ir.edit import free_name, module_path, set_tensor, tensor_node, weights_of
from panguq.ir.views import Linear
from panguq.passes.pipeline.base import PassContext
from panguq.passes.rotation.matrices import Rotation
from panguq.tensors.folded_weight import materialized

STACKED = 3  # axes of the weights of all experts, which are rotated one by one
ROWS_AT_ONCE = (
    1024  # rotated together in float64; a weight whose rows turn is in float64 as a whole
)


@dataclass(frozen=True)
class WeightRotation:
    """Rotate the indices `start` to `stop` along `axis`; before that, multiply the columns by the
    norm weight called `gain`, to which the norm adds `offset`."""

    axis: int
    rotation: Rotation
    start: int
    stop: int
    gain: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Ones:
    """Let the norm's gain, `weight + offset`, be one: its readers have taken it up."""

    offset: float


Steps = tuple[WeightRotation | Ones, ...]


class WeightPlan:
    """What each reader needs of each weight, gathered first and computed at once."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, fx.Node], list[WeightRotation | Ones]] = defaultdict(list)

    def turn(self, turn: Turn, rotation: Rotation) -> None:
        """Add one turn that the analysis found."""
        gain, offset = (None, 0.0) if turn.norm is None else _norm_weight(turn.norm)
        step = WeightRotation(turn.axis, rotation, turn.start, turn.stop, gain, offset)
        self._steps[turn.weight, turn.reader].append(step)

    def columns(self, linear: fx.Node, rotation: Rotation) -> None:
        """Rotate all columns of a linear's weight."""
        matmul = Linear.of(linear)
        step = WeightRotation(matmul.weight.meta["val"].dim() - 1, rotation, 0, matmul.shape[1])
        self._steps[matmul.weight_name, linear].append(step)

    def empty_norm(self, norm: fx.Node) -> None:
        """Replace a norm's gain by ones."""
        name, offset = _norm_weight(norm)
        self._steps[name, norm] = [Ones(offset)]

    def apply(self, gm: fx.GraphModule, ctx: PassContext) -> list[tuple[str, str]]:
        """Change the weights; returns (weight, its copy) for each that had to be copied because
        its readers need different things of it, as tied embeddings do."""
        old = weights_of(gm)
        copies: list[tuple[str, str]] = []
        changed = list(dict.fromkeys(name for name, _ in self._steps))
        for done, name in enumerate(changed):
            ctx.progress("rotate weights", done, len(changed))
            groups: dict[Steps, list[fx.Node]] = defaultdict(list)
            for reader in _readers(gm, name):
                groups[tuple(self._steps.get((name, reader), ()))].append(reader)
            keeps = next((s for s, users in groups.items() if _owns(users, name)), None)
            for index, (steps, readers) in enumerate(groups.items()):
                tensor = _computed(name, old, steps, ctx) if steps else old[name]
                if steps == keeps or (keeps is None and index == 0):
                    set_tensor(gm, name, tensor)
                else:
                    copies.append((name, _copy(gm, name, tensor, readers)))
        ctx.progress("rotate weights", len(changed), len(changed))
        return copies


def _norm_weight(norm: fx.Node) -> tuple[str, float]:
    """The name of a norm's stored weight, and what is added to it."""
    view = RmsNorm.of(norm)
    return str(view.weight.target), view.offset


def _readers(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    nodes = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]
    return list(dict.fromkeys(user for node in nodes for user in node.users))


def _owns(readers: list[fx.Node], name: str) -> bool:
    """Whether the weight is called after the module of one of these readers."""
    return any(module_path(reader) == name.rpartition(".")[0] for reader in readers)


def _copy(gm: fx.GraphModule, name: str, tensor: Tensor, readers: list[fx.Node]) -> str:
    """A weight of its own for these readers, called after the module of the first."""
    leaf = name.rpartition(".")[2]
    copy = free_name(gm, f"{module_path(readers[0])}.{leaf}".lstrip("."))
    stored = next(n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name)
    node = tensor_node(stored, copy, tensor)
    for reader in readers:
        for read in list(reader.all_input_nodes):
            if read.op == "get_attr" and read.target == name:
                reader.replace_input_with(read, node)
    return copy


def _computed(name: str, old: dict[str, Tensor], steps: Steps, ctx: PassContext) -> Tensor:
    weight = materialized(old[name])
    if isinstance(steps[0], Ones):
        return ctx.store.put(torch.full_like(weight, 1 - steps[0].offset))
    turns = [step for step in steps if isinstance(step, WeightRotation)]
    gains: dict[str | None, Tensor] = {
        s.gain: materialized(old[s.gain]).double() + s.offset for s in turns if s.gain
    }
    result = ctx.store.empty(weight.shape, weight.dtype)
    stacked = weight.dim() == STACKED
    for one, into in zip(weight, result, strict=True) if stacked else [(weight, result)]:
        _turn(one, into, [(t, t.axis - weight.dim(), gains.get(t.gain)) for t in turns])
        if not into.isfinite().all():
            raise NumericsError(
                f"rotate: weight {name} is not finite in {weight.dtype} once it is rotated",
                "check the model's own weights, or compile in bfloat16",
            )
    return result


def _turn(
    weight: Tensor, into: Tensor, turns: list[tuple[WeightRotation, int, Tensor | None]]
) -> None:
    """Write a weight `[n, k]`, or `[n]`, `into` another one, rotated along axes -1 or -2."""
    turns_rows = any(axis < -1 for _, axis, _ in turns)
    at_once = len(weight) if turns_rows or weight.dim() == 1 else ROWS_AT_ONCE
    for first in range(0, len(weight), at_once):
        rows = slice(first, first + at_once)
        exact = weight[rows].to(torch.float64, copy=True)
        for turn, axis, gain in turns:
            if gain is not None:
                exact *= gain
            lines = exact if axis == -1 else exact.T
            for some in torch.atleast_2d(lines).split(ROWS_AT_ONCE):
                part = some[..., turn.start : turn.stop]
                part.copy_(turn.rotation.apply(part))
        into[rows] = exact.to(weight.dtype)
