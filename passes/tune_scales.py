"""Weight scales, tuned all together until the model predicts what the float model predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, fx

from panguq.errors import InputError, NumericsError, RecipeError
from panguq.ir.edit import get_tensor, set_tensor
from panguq.ir.node_meta import meta_of
from panguq.ir.properties import Property
from panguq.ir.run.interpret import values
from panguq.ir.run.reverse_sweep import FirstOutput, Seen, reverse_sweep
from panguq.ir.views import DequantizedWeight, Linear
from panguq.passes.codes.adam import Adam
from panguq.passes.codes.weight_scales import storable
from panguq.passes.pipeline.base import GRADIENT_SWEEPS, Pass, PassContext, PassResult, Table
from panguq.passes.statistics.sensitivity import scored_batch
from panguq.ranks import ranks
from panguq.tensors.work_folder import Finished

T = TypeVar("T")
panguq = torch.ops.panguq
WARM_UP_STEPS = 3
POSITIONS_AT_ONCE = 128


@dataclass(frozen=True)
class TuneScales(Pass):
    """Before: `dequantize_weight(codes, scale, …)`.  After: the same, with other scales.

    Codes and zero points stay; each scale s `[n, groups]`, every expert's, becomes s · exp(c), with
    c chosen by gradient steps (Adam, arXiv 1412.6980) for the whole model at once, so that matmuls
    make up for each other's errors. The loss is the mean over tokens of KL(float ‖ quantized) of
    the predicted next token; for a model without such predictions, half the relative squared error
    of the first output. With gradient G `[n, k]` at the dequantized weight W, dloss/dc of a group
    is the sum over the group of G · W; an expert that no token reaches keeps its scales. Rounded
    activations pass gradients on as if they were not rounded.

    An epoch is one forward and one backward sweep over the calibration data, in random order, with
    one step every `batch_sequences` batches. The learning rate bounds how far a step can change a
    scale, about that share of it; it rises over three steps and then falls linearly to zero.

    In the manner of EfficientQAT's second phase (arXiv 2407.11062), which fits the text itself.
    """

    name: ClassVar[str] = "tune-scales"
    requires: ClassVar[frozenset[Property]] = frozenset(
        {Property.QDQ, Property.WEIGHT_CODES, Property.FLOAT_CACHE}
    )
    needs_calibration: ClassVar[bool] = True
    divided: ClassVar[bool] = True
    epochs: int = 2
    learning_rate: float = 2e-3
    batch_sequences: int = 2

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_sequences < 1:
            raise RecipeError(
                f"tune-scales: epochs {self.epochs} and batch_sequences {self.batch_sequences} "
                "must be at least 1"
            )
        if not 0.0 < self.learning_rate <= 0.1:
            raise RecipeError(
                f"tune-scales: learning_rate {self.learning_rate} must lie in (0, 0.1]"
            )

    @property
    def sweeps(self) -> float:
        return 1.0 + GRADIENT_SWEEPS * self.epochs

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        scales = _tunable(gm, result)
        if not scales:
            return result
        ctx.require_batches()
        if ctx.reference is None:
            raise InputError("tune-scales needs the float model beside the quantized one")
        batches = [scored_batch(batch, gm) for batch in ctx.batches]
        generator = ctx.generator()
        orders = [
            torch.randperm(len(batches), generator=generator).tolist() for _ in range(self.epochs)
        ]
        own = sorted({i for order in orders for some in self._steps(order) for i in _own(some)})
        outputs = FirstOutput(ctx.reference, [batches[index] for index in own])
        wanted = {index: place for place, index in enumerate(own)}
        loss = _Loss(lambda index: outputs.of(wanted[index]), ctx.interface.kind == "causal_lm")
        rows = []
        for epoch, order in enumerate(orders):

            def compute(epoch: int = epoch, order: list[int] = order) -> Finished:
                mean = self._epoch(gm, ctx, scales, loss, batches, order, epoch)
                return Finished(_state(scales), {"loss": mean})

            done = ctx.together(f"epoch {epoch}", compute)
            _restore(gm, scales, done)
            rows.append((epoch + 1, done.facts["loss"]))
        result.changed = len(scales)
        result.tables["epochs"] = Table(("epoch", "mean_loss"), tuple(rows))
        factors = ((s.name, *_range(s.change.exp())) for s in scales)
        columns = ("scale", "smallest_factor", "median_factor", "largest_factor")
        result.tables["scales"] = Table(columns, tuple(factors))
        for scale in scales:
            set_tensor(gm, scale.name, ctx.store.put(get_tensor(gm, scale.name)))
        return result

    def _epoch(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        scales: Sequence[_Scale],
        loss: _Loss,
        batches: Sequence[dict[str, Tensor]],
        order: Sequence[int],
        epoch: int,
    ) -> float:
        """One pass over the data; the mean loss of its batches, each before the step it is in."""
        every = self._steps(order)
        steps = len(every)
        loss.total = 0.0
        for step, at_once in enumerate(every):
            number = epoch * steps + step
            ctx.progress("tune-scales", number, self.epochs * steps)
            loss.expect(at_once)
            _add_gradients(gm, scales, [batches[index] for index in at_once], loss)
            left = 1.0 - number / (self.epochs * steps)
            warm = min(1.0, (number + 1) / WARM_UP_STEPS)
            for scale in scales:
                scale.step(gm, self.learning_rate * warm * left, number + 1)
        return loss.total / len(batches)

    def _steps(self, order: Sequence[int]) -> list[Sequence[int]]:
        """The batches of each step, by their index."""
        size = self.batch_sequences
        return [order[start : start + size] for start in range(0, len(order), size)]


def _own(at_once: Sequence[T]) -> Sequence[T]:
    """Those of a step's batches whose gradients this rank computes."""
    return at_once[ranks().rank :: ranks().count]


@dataclass
class _Scale:
    """A stored scale, the linears that use it, and Adam's state for its logarithm's change."""

    name: str
    start: Tensor
    dtype: torch.dtype
    readers: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.change, self.gradient = (torch.zeros(self.start.shape) for _ in range(2))
        self.adam = Adam.like(self.change)

    def step(self, gm: fx.GraphModule, rate: float, number: int) -> None:
        """Adam's step `number`, counted from 1, which uses up the gradient."""
        if not torch.isfinite(self.gradient).all():
            raise NumericsError(
                f"tune-scales: the gradient of {self.name} holds NaN or Inf",
                "lower tune-scales' learning_rate, or leave the pass out of the recipe",
            )
        self.change -= self.adam.step(self.gradient, number, rate)
        self.gradient.zero_()
        self.write(gm)

    def write(self, gm: fx.GraphModule) -> None:
        """Put the changed scale into the graph, as it can be stored."""
        changed = self.start.float() * self.change.exp()
        set_tensor(gm, self.name, storable(changed.to(self.start.dtype), self.dtype))


class _Loss:
    """How far predictions are from the float model's, and the gradient of that at the output.

    `wanted` gives the float model's output for a batch, by its index. `own` are the losses of the
    batches that this rank has seen since `expect`.
    """

    def __init__(self, wanted: Callable[[int], Tensor], causal_lm: bool) -> None:
        self.wanted = wanted
        self.causal_lm = causal_lm
        self.total = 0.0
        self.own: list[float] = []
        self._at_once = 0
        self._coming: Iterator[int] = iter(())

    def expect(self, batches: Sequence[int]) -> None:
        """Which batches come next, by their index; the loss of a step is their mean."""
        self._at_once, self._coming, self.own = len(batches), iter(_own(batches)), []

    def gradient(self, output: Tensor) -> Tensor:
        """At the first output of the next batch; the loss is its mean over tokens and batches."""
        wanted = self.wanted(next(self._coming))
        self.own.append(0.0)
        gradient = torch.empty_like(output)
        flat = output.reshape(-1, output.shape[-1])
        parts = zip(
            flat.split(POSITIONS_AT_ONCE),
            wanted.reshape(flat.shape).split(POSITIONS_AT_ONCE),
            gradient.view(flat.shape).split(POSITIONS_AT_ONCE),
            strict=True,
        )
        if self.causal_lm:
            for found, target, at in parts:
                logp, logq = target.float().log_softmax(-1), found.float().log_softmax(-1)
                p = logp.exp()
                self.own[-1] += float((logp.sub_(logq).mul_(p)).sum()) / len(flat)
                at.copy_(logq.exp_().sub_(p).div_(len(flat) * self._at_once))
            return gradient
        size = float(wanted.float().square().sum()) or 1.0
        for found, target, at in parts:
            difference = found.float() - target.float()
            self.own[-1] += float(difference.square().sum()) / (2 * size)
            at.copy_(difference.div_(size * self._at_once))
        return gradient


def _tunable(gm: fx.GraphModule, result: PassResult) -> list[_Scale]:
    """Scales of stored codes that linears dequantize, each once, in graph order."""
    found: dict[str, _Scale] = {}
    for node in gm.graph.nodes:
        linear = Linear.match(node)
        if linear is None or linear.is_stored or meta_of(node).scheme is None:
            continue
        weight = DequantizedWeight.match(linear.weight)
        if weight is None:
            result.skip(node, "its weight has more than one kind of scale")
            continue
        name = str(weight.scale.target)
        if name not in found:
            found[name] = _Scale(name, get_tensor(gm, name), weight.dtype)
        found[name].readers.append(node)
    return list(found.values())


def _add_gradients(
    gm: fx.GraphModule, scales: Sequence[_Scale], batches: list[dict[str, Tensor]], loss: _Loss
) -> None:
    """Add to each scale the gradient of the loss at `change`, one block of the model at a time.

    Ranks divide the batches, whose gradients are added up in their order.
    """
    place_of = {node: place for place, scale in enumerate(scales) for node in scale.readers}
    dequantized: dict[fx.Node, Tensor] = {}  # of the block at hand
    own = _own(batches)
    found = [[torch.zeros_like(scale.gradient) for scale in scales] for _ in own]
    seen_so_far = 0  # batches, of the block at hand

    def observe(seen: dict[fx.Node, Seen]) -> None:
        nonlocal seen_so_far
        gradients = found[seen_so_far]
        seen_so_far += 1
        for node, at in seen.items():
            weight, into = Linear.of(node).weight, gradients[place_of[node]]
            if weight not in dequantized:
                dequantized[weight] = values(gm, {}, [weight])[weight]
            stacked = dequantized[weight].view(-1, *Linear.of(node).shape)
            groups = into.view(*stacked.shape[:2], into.shape[-1])
            for expert, _, x, gradient in at.by_expert():
                product = (gradient.float().T @ x.float()).mul_(stacked[expert])
                groups[expert] += product.unflatten(1, (into.shape[-1], -1)).sum(-1)

    def done() -> None:
        nonlocal seen_so_far
        assert seen_so_far == len(own), "every batch passes every block"
        seen_so_far = 0
        dequantized.clear()

    reverse_sweep(gm, own, place_of, loss.gradient, observe, done, lambda *_: None)
    shares = ranks().exchange(list(zip(loss.own, found, strict=True)))
    for place in range(len(batches)):
        its_loss, gradients = shares[place % len(shares)][place // len(shares)]
        loss.total += its_loss
        for scale, gradient in zip(scales, gradients, strict=True):
            scale.gradient += gradient


def _state(scales: Sequence[_Scale]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for scale in scales:
        adam = scale.adam
        kept = {"change": scale.change, "mean": adam.mean, "square": adam.square}
        tensors |= {f"{kind}.{scale.name}": tensor for kind, tensor in kept.items()}
    return tensors


def _restore(gm: fx.GraphModule, scales: Sequence[_Scale], done: Finished) -> None:
    for scale in scales:
        scale.change, mean, square = (
            done.tensors[f"{kind}.{scale.name}"].clone() for kind in ("change", "mean", "square")
        )
        scale.adam = Adam(mean, square)
        scale.write(gm)


def _range(factors: Tensor) -> tuple[float, float, float]:
    return float(factors.min()), float(factors.median()), float(factors.max())
