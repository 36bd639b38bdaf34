"""How much each calibration token matters to the model's predictions, matmul by matmul."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.edit import label
from panguq.ir.node_meta import annotate, is_quantized
from panguq.ir.properties import Property
from panguq.ir.run.reverse_sweep import Seen, reverse_sweep
from panguq.ir.views import ExpertLinear, Linear, by_input
from panguq.passes.codes.weighed_rows import row_groups
from panguq.passes.pipeline.base import (
    GRADIENT_SWEEPS,
    Pass,
    PassContext,
    PassResult,
    Table,
    matmuls,
)
from panguq.passes.statistics.sensitivity import SampledLabels, scored_batch
from panguq.ranks import ranks
from panguq.tensors.memory import return_free_pages
from panguq.tensors.work_folder import Finished


@dataclass(frozen=True)
class WeighTokens(Pass):
    """Before: linears with schemes.  After: the same, each knowing how much every token counts.

    A matmul's output error d_t `[n]` at token t changes the predictions by about
    KL = 1/2 E[(sum_t g_t · d_t)^2], with g_t `[n]` the gradient of the log likelihood of labels
    that the model draws itself. Errors of different outputs and tokens taken as uncorrelated,
    token t counts with

        w_t = (mean over outputs of g_ti^2)^power / its mean over all tokens

    NodeMeta's `token_weights` holds w, float32 `[tokens]`, for each calibration batch. Passes that
    choose codes from inputs (gptq and its relatives) take sqrt(w_t) x_t for x_t, so that X^T X
    becomes X^T diag(w) X. Matmuls that read one value share their weights. With experts, g_t is
    that of all rows of the token together, whichever experts they went to, and its weight follows
    the token to every expert that it is sent to or shown. One forward and one backward sweep. No
    number of the graph changes.

    With `groups` above 1 the mean is that over one group of outputs, and so is X^T diag(w) X: the
    outputs of every matmul are cut into so many runs, whose rows are solved apart, and w is
    `[groups, tokens]`. A group costs a Hessian and its factor, of which one is held at a time.
    Experts' matmuls keep one weight a token.

    In the manner of GuidedQuant (arXiv 2505.07004).
    """

    name: ClassVar[str] = "weigh-tokens"
    requires: ClassVar[frozenset[Property]] = frozenset(
        {Property.CANONICAL, Property.SCHEMES, Property.FLOAT_MATMULS, Property.FLOAT_CACHE}
    )
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    divided: ClassVar[bool] = True
    power: float = 1.0
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise RecipeError(f"weigh-tokens: groups {self.groups} must be at least 1")
        if not 0.0 < self.power <= 1.0:
            raise RecipeError(f"weigh-tokens: power {self.power} must lie in (0, 1]")

    @property
    def divides_outputs(self) -> bool:
        return self.groups > 1

    @property
    def sweeps(self) -> float:
        return GRADIENT_SWEEPS

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        alike = self._alike(by_input(filter(is_quantized, matmuls(gm))))
        if alike:
            ctx.require_batches()
        rows = []
        found = self._measured(gm, ctx, alike) if alike else {}
        for value, nodes in alike.items():
            if value not in found:
                result.skip(nodes[0], "the first output does not depend on it")
                continue
            weights = found[value]
            for node in nodes:
                annotate(node, token_weights=weights)
            result.changed += len(nodes)
            every = torch.cat([batch.flatten() for batch in weights])
            rows.append((label(value), len(nodes), float(every.median()), float(every.max())))
        result.tables["token_weights"] = Table(("value", "readers", "median", "max"), tuple(rows))
        return result

    def _alike(self, readers: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, list[fx.Node]]:
        """The matmuls that share weights: by the value that they read; each alone where outputs
        have groups, experts aside."""
        if self.groups == 1:
            return readers
        found: dict[fx.Node, list[fx.Node]] = {}
        for value, nodes in readers.items():
            if ExpertLinear.match(nodes[0]) is not None:
                found[value] = nodes
            else:
                found |= {node: [node] for node in nodes}
        return found

    def _measured(
        self, gm: fx.GraphModule, ctx: PassContext, alike: dict[fx.Node, list[fx.Node]]
    ) -> dict[fx.Node, tuple[Tensor, ...]]:
        """The weights of every value that was reached; a compile that was killed measures once."""
        order = {label(value): value for value in alike}

        def compute() -> Finished:
            squares = _gradient_squares(gm, ctx, alike, self.groups)
            tensors = {}
            for value, batches in squares.items():
                powers = [batch**self.power for batch in batches]
                mean = torch.cat(powers, dim=-1).mean(-1, keepdim=True).clamp_min(1e-30)
                for index, batch in enumerate(powers):
                    tensors[f"{index}.{label(value)}"] = batch / mean
            return Finished(tensors)

        tensors = ctx.together("token weights", compute).tensors
        batches = range(len(ctx.batches))
        return {
            value: tuple(tensors[f"{index}.{name}"] for index in batches)
            for name, value in order.items()
            if f"0.{name}" in tensors
        }


def _gradient_squares(
    gm: fx.GraphModule, ctx: PassContext, alike: dict[fx.Node, list[fx.Node]], groups: int
) -> dict[fx.Node, list[Tensor]]:
    """Mean over the outputs of all matmuls that are alike of the squared gradient, `[tokens]` for
    each batch; of a matmul alone over each group of outputs, `[groups, tokens]`.

    Each rank measures its share of the batches, and gets all.
    """
    first = ranks().start(len(ctx.batches))
    labels = SampledLabels(ctx.interface.kind == "causal_lm", ctx.generator, first)
    sums: dict[fx.Node, list[Tensor]] = defaultdict(list)
    outputs = {
        value: sum(Linear.of(node).shape[0] for node in nodes) for value, nodes in alike.items()
    }
    key_of = {node: value for value, nodes in alike.items() for node in nodes}

    def observe(seen: dict[fx.Node, Seen]) -> None:
        totals: dict[fx.Node, Tensor] = {}
        for node, at in seen.items():
            value, gradient = key_of[node], at.gradient
            each_output = gradient.reshape(-1, gradient.shape[-1]).float().square()
            if value is node:
                parts = row_groups(outputs[node], groups)
                sums[node].append(torch.stack([each_output[:, part].mean(1) for part in parts]))
                continue
            squares = each_output.sum(1)
            if at.tokens is not None:  # every token has as many rows as the others
                each = squares.new_zeros(int(at.tokens.max()) + 1)
                squares = each.index_add_(0, at.tokens, squares)
            totals[value] = totals[value] + squares if value in totals else squares
        for value, total in totals.items():
            sums[value].append(total / outputs[value])

    batches = [scored_batch(batch, gm) for batch in ranks().share(ctx.batches)]
    watched = list(key_of)
    # Weights that are kept, between gradients that are not: the heap would grow block by block.
    done = return_free_pages
    reverse_sweep(gm, batches, watched, labels.gradient, observe, done, ctx.progress)
    everyone = ranks().exchange(list(sums.values()))
    return {
        value: [batch for shares in parts for batch in shares]
        for value, *parts in zip(sums, *everyone, strict=True)
    }
