"""What each way of quantizing a group of matmuls would cost the model, from one reverse sweep.

To second order, a change d of the model's parameters and inner values changes its predictions by

    KL(model ‖ changed)  =  1/2 · E[(g · d)^2],    g = gradient of log p(label)

with labels drawn from the model itself (the Fisher information; Amari, Neural Computation 10,
1998). Rounding errors are as good as uncorrelated from one element to the next, so only the squares
of their products with the gradient count:

    KL  =  1/2 · ( sum_ij F_ij · (Q(W) - W)_ij^2  +  sum_tj Gx_tj^2 · (Q(x) - x)_tj^2 ) / tokens
    F_ij  = sum over batches of (sum_t Gy_ti · x_tj)^2      `[n, k]`
    Gx_tj = sum over the group's matmuls of sum_i Gy_ti · W_ij

in nats, mean per scored token, with x `[tokens, k]` the input of the group and Gy `[tokens, n]` the
gradient at a matmul's output. Labels of one sequence are independent given its tokens, so the
square of a whole sequence's gradient is, in the mean, the sum of its labels' squares: one backward
sweep serves all groups and all schemes. Squares of gradients of W as the weight's sensitivity:
Kim et al., SqueezeLLM, arXiv 2306.07629, who take them at the data's labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from panguq.ir.edit import get_tensor
from panguq.ir.input_statistics import InputStatistics
from panguq.ir.ops import quantize  # noqa: F401  (registers the quantize ops)
from panguq.ir.quant_spec import QuantSpec, Scheme
from panguq.ir.run.reverse_sweep import Seen, reverse_sweep
from panguq.ir.views import ExpertLinear, Linear, by_input, results_of
from panguq.passes.codes.static_scales import affine
from panguq.passes.codes.token_scales import quantized_tokens
from panguq.passes.codes.weight_scales import quantize_groups, search_scale
from panguq.passes.pipeline.base import PassContext
from panguq.tensors.folded_weight import materialized
from panguq.tensors.memory import return_free_pages
from panguq.tensors.row_slices import row_slices
from panguq.tensors.weight_store import WeightStore

panguq = torch.ops.panguq
LOGITS_AT_ONCE = 1 << 26  # elements: beyond that, only some of a sequence's positions are scored


@dataclass
class _Matmul:
    """Sums over the batches for one linear, or for all its experts: squared gradients
    `[experts, n, k]`, squared inputs `[experts, k]`, tokens `[experts]`."""

    fisher: Tensor
    square_sum: Tensor
    tokens: Tensor


@dataclass
class _Sums:
    """What the current block has gathered.

    `activation`: what rounding a value costs, float64 `[experts]`, by its first reader.
    """

    matmuls: dict[fx.Node, _Matmul] = field(default_factory=dict)
    activation: dict[tuple[fx.Node, QuantSpec], Tensor] = field(default_factory=dict)
    weights: dict[fx.Node, Tensor] = field(default_factory=dict)

    def weight(self, gm: fx.GraphModule, node: fx.Node) -> Tensor:
        """The linear's weight `[experts, n, k]`, of one expert where there are none; computed once
        a block if it is a product not yet stored."""
        if node not in self.weights:
            weight = materialized(get_tensor(gm, Linear.of(node).weight_name))
            self.weights[node] = weight if ExpertLinear.match(node) else weight[None]
        return self.weights[node]

    def clear(self) -> None:
        """Forget the block."""
        self.matmuls.clear()
        self.activation.clear()
        self.weights.clear()


def measure(
    gm: fx.GraphModule,
    ctx: PassContext,
    choices: Mapping[tuple[fx.Node, ...], Sequence[Scheme]],
    ratios: tuple[float, ...],
    by_expert: dict[fx.Node, Tensor] | None = None,
) -> dict[tuple[fx.Node, ...], list[float]]:
    """The expected KL of quantizing each group alone, for each of its schemes, in nats a token.

    choices: for each group of linears, those of experts among them, the schemes in question.
    ratios: the clip ratios of the search for each weight's scales, weighted by the inputs.
    by_expert: takes what each expert adds by its own weight and by rounding its rows, which counts
        for the first matmul that reads them, float64 `[schemes, experts]` by matmul.

    For a graph that is no language model the outputs' relative squared error takes the place of
    the KL: half the squared error over the mean square. Raises InputError without calibration
    data and NumericsError for values that are not finite.
    """
    ctx.require_batches()
    group_of = {node: group for group in choices for node in group}
    result = {group: [0.0] * len(schemes) for group, schemes in choices.items()}
    score = SampledLabels(ctx.interface.kind == "causal_lm", ctx.generator)
    sums = _Sums()
    each: dict[fx.Node, Tensor] = {} if by_expert is None else by_expert

    def observe(seen: dict[fx.Node, Seen]) -> None:
        for node, at in seen.items():
            if node not in sums.matmuls:
                sums.matmuls[node] = _empty_sums(node, ctx.store)
            _add_matmul(sums.matmuls[node], at)
        for group in dict.fromkeys(group_of[node] for node in seen):
            specs = dict.fromkeys(s.activation for s in choices[group] if s.activation)
            for siblings in by_input(group).values() if specs else ():
                _add_activation(gm, sums, siblings, seen, tuple(specs))

    def block_done() -> None:
        for group in dict.fromkeys(group_of[node] for node in sums.matmuls):
            for index, scheme in enumerate(choices[group]):
                for node in group:
                    if node in sums.matmuls and scheme.weight is not None:
                        weight = sums.weight(gm, node)
                        errors = _weight_errors(weight, sums.matmuls[node], scheme.weight, ratios)
                        if scheme.activation is not None:
                            errors += sums.activation.get((node, scheme.activation), 0.0)
                        result[group][index] += float(errors.sum()) / 2
                        if ExpertLinear.match(node) is not None:
                            none = errors.new_zeros(len(choices[group]), len(errors))
                            each.setdefault(node, none)[index] = errors / 2
        sums.clear()
        return_free_pages()

    batches = [scored_batch(batch, gm) for batch in ctx.batches]
    reverse_sweep(gm, batches, group_of, score.gradient, observe, block_done, ctx.progress)
    for kls_of_experts in each.values():
        kls_of_experts /= score.total
    return {group: [kl / score.total for kl in kls] for group, kls in result.items()}


class SampledLabels:
    """The gradient of the log likelihood of labels that the model draws from its own logits.

    Each batch has a generator of its own, by its place among all; `first` is that of the next one.
    """

    def __init__(
        self, causal_lm: bool, generators: Callable[[int], torch.Generator], first: int = 0
    ) -> None:
        self.causal_lm = causal_lm
        self.generators = generators
        self.next = first
        self.total = 0.0

    def gradient(self, output: Tensor) -> Tensor:
        """At logits `[..., vocab]` of the next batch: one-hot(label) - softmax. `total` counts the
        tokens.

        Elsewhere: Gaussian noise, under which E[(g · d)^2] is |d|^2; `total` sums squares.
        """
        generator = self.generators(self.next)
        self.next += 1
        if not self.causal_lm:
            self.total += float(output.double().square().sum()) or 1.0
            noise = torch.randn(output.shape, generator=generator)
            return noise.to(output.dtype)
        rows = output.reshape(-1, output.shape[-1])
        self.total += len(rows)
        probabilities = rows.float().softmax(-1)
        labels = drawn(probabilities, generator)
        gradient = probabilities.neg_()
        gradient.scatter_add_(1, labels, torch.ones_like(labels, dtype=gradient.dtype))
        return gradient.view(output.shape).to(output.dtype)


def drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """An index for each row of `[rows, n]`, drawn by its probabilities; int64 `[rows, 1]`.

    Where the sum of a row's first ones exceeds a random share of all. multinomial() refuses large
    vocabularies, and a random number for each element costs more than a matmul that gives logits.
    """
    share = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64)
    labels = []
    for some in row_slices(probabilities):
        sums = probabilities[some].cumsum(-1, dtype=torch.float64)
        labels.append(torch.searchsorted(sums, share[some] * sums[:, -1:], right=True))
    return torch.cat(labels).clamp_max_(probabilities.shape[1] - 1)


def scored_batch(batch: dict[str, Tensor], gm: fx.GraphModule) -> dict[str, Tensor]:
    """The batch with logits at all of its positions, or at evenly spread ones if they are many."""
    if "logit_positions" not in batch:
        return batch
    ids = batch["input_ids"]
    vocabulary = int(results_of(gm)[0].meta["val"].shape[-1])
    step = -(-ids.numel() * vocabulary // LOGITS_AT_ONCE)
    return batch | {"logit_positions": torch.arange(0, ids.shape[1], step)}


def _empty_sums(node: fx.Node, store: WeightStore) -> _Matmul:
    """All zero; what experts of one layer need may exceed memory, so it lies in a file."""
    n, k = Linear.of(node).shape
    view = ExpertLinear.match(node)
    experts = 1 if view is None else view.experts
    fisher = store.empty((experts, n, k), torch.float32).zero_()
    return _Matmul(fisher, torch.zeros(experts, k), torch.zeros(experts, dtype=torch.int64))


def _add_matmul(sums: _Matmul, seen: Seen) -> None:
    for expert, _, x, gradient in seen.by_expert():
        tokens = x.float()
        sums.fisher[expert] += (gradient.float().T @ tokens).square_()
        sums.square_sum[expert] += tokens.square().sum(0)
        sums.tokens[expert] += len(tokens)


def _add_activation(
    gm: fx.GraphModule,
    sums: _Sums,
    siblings: Sequence[fx.Node],
    seen: dict[fx.Node, Seen],
    specs: tuple[QuantSpec, ...],
) -> None:
    """What rounding the value that these read costs."""
    observed = [node for node in siblings if node in seen]
    if not observed:
        return
    x = seen[observed[0]].x
    at_input = torch.zeros(x.shape[:-1].numel(), x.shape[-1])
    for node in observed:
        weight = sums.weight(gm, node)
        for expert, rows, _, gradient in seen[node].by_expert():
            at_input[rows] += (gradient.to(weight.dtype) @ weight[expert]).float()
    for spec in specs:
        error = quantize_activation(x, spec).float() - x.float()
        squares = (at_input.view(error.shape) * error).square_().flatten(0, -2)
        none = torch.zeros(len(sums.weight(gm, observed[0])), dtype=torch.float64)
        total = sums.activation.setdefault((observed[0], spec), none)
        for expert, rows, _, _ in seen[observed[0]].by_expert():
            total[expert] += squares[rows].sum(dtype=torch.float64)


def quantize_activation(x: Tensor, spec: QuantSpec) -> Tensor:
    """x `[..., k]` rounded to the grid of `spec`; a static range is that of x's plain tokens."""
    if spec.dynamic:
        return quantized_tokens(x, spec, x.dtype)
    seen = InputStatistics(x.shape[-1], torch.ones(x.shape[-1]))
    seen.add(x)
    step, offset = affine(seen.histogram.low, seen.histogram.high, spec, x.dtype)
    scale, zero = torch.tensor([step]), torch.tensor([offset], dtype=torch.int32)
    codes = panguq.quantize_per_tensor(x, scale, zero, spec.quant_min, spec.quant_max)
    return panguq.dequantize(codes, scale, zero, x.dtype)


def _weight_errors(
    weight: Tensor, seen: _Matmul, spec: QuantSpec, ratios: tuple[float, ...]
) -> Tensor:
    """sum_ij F_ij (Q(W) - W)_ij^2 of every expert, with the scales that the clip search finds.

    float64 `[experts]`; 0 for an expert that no token reached.
    """
    size = spec.group_size_for(weight.shape[-1])
    total = torch.zeros(len(weight), dtype=torch.float64)
    for expert in seen.tokens.nonzero().flatten().tolist():
        importance = seen.square_sum[expert] / seen.tokens[expert]
        for some in row_slices(weight[expert]):
            rows = weight[expert][some]
            scale, zero = search_scale(rows, size, spec, importance, ratios)
            groups = rows.float().reshape(rows.shape[0], -1, size)
            error = quantize_groups(groups, scale, zero, spec).sub_(groups).square_()
            total[expert] += float(error.view(rows.shape).mul_(seen.fisher[expert][some]).sum())
    return total
