"""Learn small invertible maps in front of matmuls, under which 4 bits serve both operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.decibels import decibels
from panguq.errors import NumericsError, RecipeError
from panguq.ir.edit import call, free_name, get_tensor, label, module_path, set_tensor, tensor_node
from panguq.ir.node_meta import annotate
from panguq.ir.properties import Property
from panguq.ir.views import Linear
from panguq.passes.pipeline.base import (
    GRADIENT_SWEEPS,
    Pass,
    PassContext,
    PassResult,
    Region,
    Table,
)
from panguq.passes.scaling import folding
from panguq.passes.transforms.blocks import Piece, TwoRuns, pieces_of
from panguq.passes.transforms.learned import Learned, stored_weights
from panguq.passes.transforms.sites import TransformSite, find_transform_sites
from panguq.passes.transforms.stability import Stability, stability
from panguq.passes.transforms.training import LearningPlan, Problem, mean_error, train
from panguq.tensors.folded_weight import materialized
from panguq.tensors.work_folder import Finished

panguq = torch.ops.panguq


@dataclass(frozen=True)
class FlatQuant(Pass):
    """Before: x ─► linear(W).  After: x / s ─► kronecker(L, R) ─► linear(W diag(s) (L ⊗ R)^-T).

    Same function: L `[a, a]` and R `[b, b]`, a * b = k, are invertible. x `[..., k]` are the inputs
    of matmuls with 4-bit activations, a scale each token; what reads one x shares its map.

        s        per channel, taken up by what makes x (a norm's weight, rows of v_proj and up_proj,
                 by the analysis of `ir/analysis/channels.py`); 1 where nothing can
        L, R     one op in front of the matmul, left^T X right on each row of x as X `[a, b]`
        clips    a token's largest code stands for so much of its largest magnitude; the weight's
                 own, per output, serves while learning, and its solver chooses anew

    All are learned (Adam), `blocks_at_once` of the model's blocks after the others, so that the
    blocks' output with weights and activations rounded, fed by the quantized model in front, is
    that of the float model: the loss is the mean over tokens of the squared error over the token's
    square. Rounding counts as the identity in gradients. L and R begin as random rotations
    (Hadamard matrices where there are any), s as in SmoothQuant with `alpha`. Blocks that learning
    does not help keep that. A compile that was killed repeats none that is finished.

    The table tells each block's error before and after, in dB below its output, on the first and
    the last quarter of the texts, of those that the model itself wrote (`sampled`) apart: W4A4
    models are known to drift where they reason at length. A block whose error grows is named.

    In the form of Sun et al., FlatQuant, arXiv 2410.09426.
    """

    name: ClassVar[str] = "flatquant"
    requires: ClassVar[frozenset[Property]] = frozenset(
        {Property.CANONICAL, Property.SCHEMES, Property.FLOAT_MATMULS}
    )
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.STATISTICS, Property.CALIBRATED})
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    epochs: int = 5
    learning_rate: float = 2e-2
    batch_sequences: int = 1
    blocks_at_once: int = 2
    alpha: float = 0.5

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_sequences", "blocks_at_once"):
            if getattr(self, name) < 1:
                raise RecipeError(f"flatquant: {name} {getattr(self, name)} must be at least 1")
        if not 0.0 < self.learning_rate <= 0.1:
            raise RecipeError(f"flatquant: learning_rate {self.learning_rate} must lie in (0, 0.1]")
        if not 0.0 <= self.alpha <= 1.0:
            raise RecipeError(f"flatquant: alpha {self.alpha} must lie in [0, 1]")

    @property
    def sweeps(self) -> float:
        return 4.0 + GRADIENT_SWEEPS * self.epochs

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        sites = find_transform_sites(gm, ctx.interface, result)
        if not sites:
            return result
        ctx.require_batches()
        pieces = pieces_of(gm, {n for s in sites for n in s.linears}, self.blocks_at_once)
        runs = TwoRuns(gm, ctx.batches)
        learned: list[Learned] = []
        rows: list[tuple[object, ...]] = []
        for done, piece in enumerate(pieces):
            ctx.progress("flatquant", done, len(pieces))
            inside = [s for s in sites if _lies_in(s, piece, result)]
            found, row = self._learn(ctx, runs, piece, inside)
            learned += found
            if row:
                rows.append(row)
        ctx.progress("flatquant", len(pieces), len(pieces))
        result.sites = _regions(gm, learned)
        _rewrite(gm, ctx, learned)
        result.changed = len(learned)
        columns = (
            *("block", "sites", "db_before", "db_after", "db_early", "db_late"),
            *("written_db_early", "written_db_late", "condition", "smallest_clip"),
        )
        result.tables["blocks"] = Table(columns, tuple(rows))
        return result

    def _learn(
        self, ctx: PassContext, runs: TwoRuns, piece: Piece, sites: Sequence[TransformSite]
    ) -> tuple[list[Learned], tuple[object, ...]]:
        """What is learned of a piece's sites, and its row of the table."""
        weights = runs.weights(piece)
        wanted: list[Mapping[fx.Node, Tensor]] = []
        squares = {site.x: torch.zeros(len(site.column)) for site in sites}
        for values, compared in runs.float_step(piece, weights):
            for x, square in squares.items():
                square += values[x].reshape(-1, len(square)).float().square().mean(0)
            wanted.append(compared if sites else {})
        generator = ctx.generator()
        learned = []
        for site in sites:
            size = (squares[site.x] / len(ctx.batches)).sqrt()
            stored = stored_weights(site, weights)
            learned.append(Learned.begin(site, size, stored, self.alpha, generator))
        problem = Problem(piece, weights, runs.quantized, wanted)
        row: tuple[object, ...] = ()
        if learned:
            plan = LearningPlan(self.epochs, self.learning_rate, self.batch_sequences)

            def compute() -> Finished:
                before = mean_error(problem.all_errors(learned))
                train(problem, learned, plan, generator)
                errors = problem.all_errors(learned)
                facts: dict[str, float | str] = {"before": before, "after": mean_error(errors)}
                tensors = {
                    f"{i}.{name}": value
                    for i, one in enumerate(learned)
                    for name, value in one.parameters().items()
                }
                return Finished(tensors, facts | _facts(ctx, wanted, errors))

            done = ctx.once(f"block {piece.name}", compute)
            for i, one in enumerate(learned):
                names = one.parameters()
                one.load({name: done.tensors[f"{i}.{name}"] for name in names})
            row = _row(ctx, piece, learned, done)
        runs.quantized_step(piece, weights, problem.rounded(learned))
        return learned, row


def _lies_in(site: TransformSite, piece: Piece, result: PassResult) -> bool:
    inside = [linear in piece.nodes for linear in site.linears]
    if any(inside) and not all(inside):
        result.skip(site.x, "the linears that read it lie in several blocks")
    return all(inside)


def _facts(
    ctx: PassContext, wanted: Sequence[Mapping[fx.Node, Tensor]], errors: Sequence[Tensor]
) -> dict[str, float | str]:
    """How errors grow along the texts that were given, and along those that the model wrote."""
    lengths = [0] * len(errors)
    if len(wanted[0]) == 1:  # of two values, tokens follow tokens
        values = [next(iter(compared.values())) for compared in wanted]
        lengths = [value.shape[1] if value.dim() == 3 else 0 for value in values]
    given = len(errors) - ctx.written
    facts: dict[str, float | str] = {}
    for kind, some in (("given", slice(None, given)), ("written", slice(given, None))):
        early, late = stability(errors[some], lengths[some])
        facts |= {f"{kind}_early": early, f"{kind}_late": late}
    return facts


def _row(
    ctx: PassContext, piece: Piece, learned: Sequence[Learned], done: Finished
) -> tuple[object, ...]:
    facts = done.facts
    grown = {
        kind: Stability(facts[f"{kind}_early"], facts[f"{kind}_late"])  # type: ignore[arg-type]
        for kind in ("given", "written")
    }
    for kind, found in grown.items():
        if found.grows:
            text = "calibration text" if kind == "given" else "text that the model itself wrote"
            ctx.warnings.append(
                f"flatquant: the error of the block that ends in {piece.name} grows along {text}, "
                f"from {found.early:.1f} to {found.late:.1f} dB of its output; give its matmuls "
                "8-bit activations in the recipe"
            )
    factors = [one.stored(torch.float32) for one in learned]
    return (
        *(piece.name, len(learned)),
        *(decibels(float(facts[name] or 0)) for name in ("before", "after")),
        *grown["given"],
        *grown["written"],
        max(f.condition for f in factors),
        min(float(one.clip.sigmoid()) for one in learned),
    )


def _regions(gm: fx.GraphModule, learned: Sequence[Learned]) -> list[Region]:
    scales = [one.site.scales for one in learned if one.site.scales is not None]
    rescaled = {value for site in scales for value in site.values}
    found = folding.regions(gm, scales)
    for one in learned:
        outputs = [label(n) for n in one.site.linears if n not in rescaled]
        if one.site.scales is None and outputs:
            found.append(Region((label(one.site.x),), tuple(outputs)))
    return found


def _rewrite(gm: fx.GraphModule, ctx: PassContext, learned: Sequence[Learned]) -> None:
    """Let the graph compute what was learned."""
    scales: folding.Factors = {}
    for one in learned:
        if one.site.scales is not None:
            chosen = one.log_scale.double().exp()
            chosen = folding.storable_factors(gm, one.site.scales, chosen)
            folding.add_factors(one.site.scales, chosen, scales)
    turned = {Linear.of(n).weight_name: one for one in learned for n in one.site.linears}
    own = {name: scales.pop(name, {}) for name in turned}
    folding.fold(gm, ctx, scales, "flatquant")
    for one in learned:
        site, factors = one.site, one.stored(one.site.x.meta["val"].dtype)
        for linear in site.linears:
            name = Linear.of(linear).weight_name
            weight = materialized(get_tensor(gm, name))
            into = ctx.store.empty(weight.shape, weight.dtype)
            factors.absorbed(weight, into, own[name])
            if not into.isfinite().all():
                raise NumericsError(
                    f"flatquant: weight {name} overflows {into.dtype} when it takes up the map",
                    "lower flatquant's learning_rate, or compile in bfloat16",
                )
            set_tensor(gm, name, into)
        first = site.linears[0]
        stored = [
            tensor_node(first, free_name(gm, f"{module_path(first)}.{side}_trans"), matrix)
            for side, matrix in (("left", factors.left), ("right", factors.right))
        ]
        args = (site.x, *stored)
        value = call(first, panguq.kronecker.default, args, origin=site.x, suffix=".kronecker")
        for linear in site.linears:
            Linear.of(linear).read_input(value)
            annotate(linear, input_clip=float(one.clip.sigmoid()))
