"""How well a scale serves the matmuls that absorb it: the error of what will be stored and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from panguq.ir.analysis.channels import ScaleSite
from panguq.ir.edit import get_tensor
from panguq.ir.input_statistics import InputStatistics, plain_tokens
from panguq.ir.node_meta import is_quantized, scheme_of
from panguq.ir.ops import quantize  # noqa: F401  (registers the quantize ops)
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.views import Linear
from panguq.passes.codes.gram import gram, output_error
from panguq.passes.codes.static_scales import affine
from panguq.passes.codes.token_scales import quantized_tokens
from panguq.passes.codes.weight_scales import quantize_groups, search_scale
from panguq.passes.scaling.folding import Factors
from panguq.ranks import ranks

panguq = torch.ops.panguq

PLAIN_SAMPLE = 256  # tokens that are quantized under every candidate
MASSIVE_SAMPLE = 32
RANGE_SAMPLE = 64  # of these, tokens that choose a static range
RANGE_RATIOS = tuple(2.0 ** (-step / 4) for step in range(9))
CLIP_RATIOS = (1.0, 0.9, 0.8, 0.7)  # for codes below 8 bits; wider ones are hardly worth clipping
ROWS = 512  # outputs of a linear whose error is measured, evenly spaced


@dataclass(frozen=True)
class SeenInput:
    """What the search reads of a value `[..., k]`.

    `mean_abs` `[k]` over all tokens. `tokens` `[t, k]` are a sample, each standing for `weights`
    `[t]` tokens. Where all readers keep the value in floating point nothing is sampled: these are
    all tokens, or, where they are more than k, `moment` `[k, k]`, the sum of their x x^T.
    """

    statistics: InputStatistics
    mean_abs: Tensor
    tokens: Tensor
    weights: Tensor
    moment: Tensor | None = None


def look_at(
    values: Sequence[Tensor],
    readers: Sequence[fx.Node],
    generator: torch.Generator,
    sampled: bool = True,
) -> SeenInput:
    """What the search needs to know of a value, given it in all batches, for these linears.

    Of batches that ranks share, each gives its own and gets what all have seen.
    """
    k = values[0].shape[-1]
    statistics, total = InputStatistics(k), torch.zeros(k)
    flat = [value.reshape(-1, k) for value in values]
    seen = [(statistics.of(rows), rows.float().abs().sum(0)) for rows in flat]
    for of_batch, magnitudes in ranks().in_order(seen):
        statistics.merge(of_batch)
        total += magnitudes
    mean_abs = total / statistics.tokens
    none = torch.empty(0, k), torch.empty(0)
    if not sampled:
        return SeenInput(statistics, mean_abs, *none)
    activations = [scheme_of(node).activation for node in filter(is_quantized, readers)]
    if not any(activations) and statistics.tokens > k:
        return SeenInput(statistics, mean_abs, *none, gram(values).float())
    if not any(activations):
        tokens = torch.cat(ranks().in_order(flat)).float()
        return SeenInput(statistics, mean_abs, tokens, torch.ones(len(tokens)))
    plain = ranks().in_order([plain_tokens(rows.float().abs().amax(1)) for rows in flat])
    # No static range fits massive tokens, which are left to the passes that treat them.
    static = any(spec is not None and not spec.dynamic for spec in activations)
    most = (PLAIN_SAMPLE, 0 if static else MASSIVE_SAMPLE)
    index, weights = _sample(torch.cat(plain), most, generator)
    before = sum(len(mask) for mask in plain[: ranks().start(len(plain))])
    return SeenInput(statistics, mean_abs, _tokens_at(index, flat, before), weights)


def _tokens_at(index: Tensor, own: Sequence[Tensor], before: int) -> Tensor:
    """The tokens at these places `[t]` of all batches, float32 `[t, k]`; `own` are those of this
    rank `[.., k]`, and so many tokens lie before them."""
    rows = torch.cat(list(own))
    place = index - before
    mine = ((place >= 0) & (place < len(rows))).nonzero().flatten()
    found = torch.empty(len(index), rows.shape[1])
    for places, tokens in ranks().exchange((mine, rows[place[mine]].float())):
        found[places] = tokens
    return found


def _sample(
    plain: Tensor, most: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """At most so many plain and massive tokens, and how many tokens each of them stands for."""
    index, copies = [], []
    for mask, limit in zip((plain, ~plain), most, strict=True):
        which = mask.nonzero().flatten()
        few = which[torch.randperm(len(which), generator=generator)[:limit]]
        index.append(few)
        copies.append(torch.full((len(few),), len(which) / max(len(few), 1)))
    return torch.cat(index), torch.cat(copies)


class MatmulError:
    """The output error of one linear as a function of the scale c `[k]` of its columns.

    `error(c) = sum_t w_t |Q(W c) Q(x_t / c) - W x_t|^2` under the linear's own scheme, `signal` the
    same sum over |W x_t|^2, both over at most `ROWS` outputs. Where the activation stays in
    floating point the error is tr(D M D^T) with D = Q(W c) / c - W and M = sum_t x_t x_t^T.
    Massive tokens count in full: what they leave in the residual stream serves all later tokens.
    """

    def __init__(self, weight: Tensor, linear: fx.Node, seen: SeenInput) -> None:
        outputs = weight.shape[:-1].numel()  # those of all experts are under each other
        rows = torch.linspace(0, outputs - 1, min(ROWS, outputs)).round().long()
        self.weight = weight[torch.unravel_index(rows, weight.shape[:-1])].float()
        self.weight_dtype = weight.dtype
        self.input_dtype = Linear.of(linear).input.meta["val"].dtype
        self.scheme = scheme_of(linear)
        self.seen = seen
        if seen.moment is None:
            self.output = seen.tokens @ self.weight.T
            self.signal = float(self.output.square().sum(1) @ seen.weights)
        else:
            self.signal = float(output_error(self.weight, seen.moment).sum())

    def __call__(self, scale: Tensor) -> float:
        """The error under the scale `[k]`."""
        if self.scheme.weight is None:
            return 0.0
        scale = scale.float()
        weight = self._quantized_weight(scale, self.scheme.weight)
        if self.seen.moment is not None:
            return float(output_error(weight / scale - self.weight, self.seen.moment).sum())
        x = self.seen.tokens / scale
        if self.scheme.activation is not None:
            x = quantized_input(x, self.scheme.activation, weight.square().sum(0), self.input_dtype)
        return float((x @ weight.T - self.output).square_().sum(1) @ self.seen.weights)

    def _quantized_weight(self, scale: Tensor, spec: QuantSpec) -> Tensor:
        scaled = (self.weight * scale).to(self.weight_dtype)
        size = spec.group_size_for(scaled.shape[1])
        ratios = CLIP_RATIOS if spec.bits < 8 else (1.0,)
        importance = self.seen.statistics.mean_square / scale.square()
        chosen = search_scale(scaled, size, spec, importance, ratios)
        groups = scaled.float().reshape(len(scaled), -1, size)
        return quantize_groups(groups, *chosen, spec).view(scaled.shape)


def quantized_input(x: Tensor, spec: QuantSpec, energy: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` `[t, k]` through its quantizer, float32.

    A static range is the clipped one of least squared error on a few of the tokens, each channel
    counted by the weights that it meets, `energy` `[k]`.
    """
    if spec.dynamic:
        return quantized_tokens(x, spec, torch.float32)

    def through(tokens: Tensor, step: float, zero_point: int) -> Tensor:
        scale, zero = torch.tensor([step]), torch.tensor([zero_point], dtype=torch.int32)
        codes = panguq.quantize_per_tensor(tokens, scale, zero, spec.quant_min, spec.quant_max)
        return panguq.dequantize(codes, scale, zero, torch.float32)

    few = x[torch.linspace(0, len(x) - 1, min(RANGE_SAMPLE, len(x))).long()]
    low, high = (float(bound) for bound in torch.aminmax(x))
    candidates = [affine(low * ratio, high * ratio, spec, dtype) for ratio in RANGE_RATIOS]
    errors = [float((through(few, *c) - few).square_().sum(0) @ energy) for c in candidates]
    return through(x, *candidates[errors.index(min(errors))])


class SiteError:
    """Noise over signal of all quantized linears that absorb a site's scale, in the mean.

    Each linear counts relative to its own output, so that none drowns the others. Columns count
    as the sites before left them (`factors`).
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        site: ScaleSite,
        seen: Mapping[fx.Node, SeenInput],
        factors: Factors,
    ) -> None:
        self.parts = []
        for consumer in site.consumers:
            if not is_quantized(consumer.linear):
                continue
            weight = get_tensor(gm, consumer.weight)
            ones = torch.ones(weight.shape[-1], dtype=torch.float64)
            so_far = factors.get(consumer.weight, {}).get(weight.dim() - 1, ones)
            error = MatmulError(weight, consumer.linear, seen[Linear.of(consumer.linear).input])
            self.parts.append((consumer.channel, so_far, error))

    def __call__(self, scale: Tensor) -> float:
        """The error under the scale `[channels]` of the site."""
        total = 0.0
        for channel, so_far, error in self.parts:
            columns = torch.where(channel < 0, 1.0, scale[channel.clamp_min(0)])
            noise = error(so_far * columns)
            total += noise / max(error.signal, 1e-30)
        return total / len(self.parts)

    def of_all(self, scales: Sequence[Tensor]) -> list[float]:
        """The error under each of these scales `[channels]`; ranks divide them."""
        return ranks().each(scales, lambda scale: 1.0, self)
