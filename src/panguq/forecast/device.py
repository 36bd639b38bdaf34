"""What a device takes for one forward, kernel after kernel, as one stream runs them.

    matmul     max(its kernel's own cost, products / (share of the cube's peak),
                   bytes / (share of memory's rate), the least time of a matmul)
    attention  start + max(scores of the busiest core, bytes / …)
    vector op  max(bytes / …, the least time); what quantizes the inputs of matmuls is one, too

The kernel's own cost is the target's (`lowering/ascend/cost`), of the vendor's kernels alone, which
is what servers run; the shares and least times are those of `achieved.py`. Attention's start and
what a score takes are those of `lowering/ascend/op_times`, of CANN's timed attention. There, a
head's queries are dealt to the cores as well; a server's kernel is taken to deal whole heads: 12 of
them keep 12 of 24 cores busy. With that, requests of a model of
12 heads with prompts of 16384 tokens are predicted within 9 %, without within 14 %, all too fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from panguq.errors import LoweringError
from panguq.forecast.achieved import Achieved
from panguq.forecast.parallel import Cards
from panguq.forecast.sizes import OpenSizes
from panguq.forecast.work import AttentionWork, MatmulWork, VectorWork, Work
from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.cost.experts import typical_rows
from panguq.lowering.ascend.op_times.attention import SCORE_WIDTH, SCORES
from panguq.lowering.ascend.op_times.price import constants_of, machine_of
from panguq.lowering.problem import FLOAT_BYTES, MatmulProblem, WeightFormat
from panguq.lowering.select_kernel import scheme_refusal
from panguq.lowering.target import Peaks, Target


@dataclass(frozen=True)
class Settled:
    """A matmul's problem with the scheme that it gets, and why not the one that was asked for."""

    problem: MatmulProblem
    note: str = ""


@dataclass
class Device:
    """A target with what models reach of it, on some cards. Costs are kept: layers are alike."""

    target: Target
    achieved: Achieved
    cards: Cards
    weight_format: WeightFormat
    _settled: dict[MatmulProblem, Settled] = field(default_factory=dict)
    _costs: dict[tuple[MatmulProblem, int], float] = field(default_factory=dict)

    @property
    def peaks(self) -> Peaks:
        """Raises LoweringError for a target of which no model is predicted."""
        if self.target.peaks is None:
            raise LoweringError(f"target {self.target.name} does not predict whole models")
        return self.target.peaks

    def settled(self, work: MatmulWork, as_float: bool = False) -> Settled:
        """What one card computes. Raises LoweringError if not even a fallback has a kernel."""
        problem = self.cards.problem(work)
        if as_float:
            problem = replace(problem, scheme=SCHEMES["FLOAT"])
        if problem not in self._settled:
            self._settled[problem] = self._settle(problem)
        return self._settled[problem]

    def _settle(self, problem: MatmulProblem) -> Settled:
        wanted, note = problem.scheme, ""
        if wanted.is_float:
            return Settled(problem)
        problem = self._stored(problem)
        refusal = scheme_refusal(problem, self.target)
        for scheme in self.target.fallbacks(wanted) if refusal else ():
            problem = self._stored(replace(problem, scheme=scheme))
            note = f"{wanted.name} refused: {refusal}"
            if scheme.is_float or scheme_refusal(problem, self.target) is None:
                return Settled(problem, note)
        if refusal:
            self.target.legal(self.target.candidates(problem), problem)
        return Settled(problem)

    def _stored(self, problem: MatmulProblem) -> MatmulProblem:
        """In the cube's order of blocks where the target's kernels read it and servers keep it."""
        formats = self.target.weight_formats(problem, "auto")
        fits = self.weight_format in formats
        return replace(problem, weight_format=self.weight_format if fits else formats[0])

    def matmul_us(self, problem: MatmulProblem, m: int) -> float:
        """Of `m` tokens: every one meets `top_k` of the experts, or the one weight there is."""
        if (problem, m) not in self._costs:
            legal = [c for c in self.target.candidates(problem) if c.refusal is None]
            own = float(self.target.total_us(legal, problem, np.array([m])).min())
            self._costs[problem, m] = max(own, self._least_us(problem, m))
        return self._costs[problem, m]

    def _least_us(self, problem: MatmulProblem, m: int) -> float:
        weight, activation = problem.scheme.weight, problem.scheme.activation
        size, rows, stored = FLOAT_BYTES[problem.dtype], m, 1
        if problem.experts:
            counts = typical_rows(m, problem.top_k, problem.experts)
            rows, stored = sum(counts), sum(count > 0 for count in counts)
        bits = 8 * size if weight is None else weight.bits
        inputs = size if activation is None else activation.bits / 8
        products = rows * problem.n * problem.k
        faster = 1.0 if activation is None else 16 / max(activation.bits, bits)
        moved = stored * problem.n * problem.k * bits / 8
        moved += rows * (problem.k * inputs + problem.n * size)
        return max(
            self.achieved.matmul_us,
            products / (self.peaks.macs_per_us * faster * self.achieved.cube_share),
            self._moving_us(moved),
        )

    def _moving_us(self, moved: float) -> float:
        return moved / (self.peaks.bytes_per_us * self.achieved.memory_share)

    def _vector_us(self, moved: float) -> float:
        return max(self.achieved.vector_us, self._moving_us(moved))

    def forward(self, work: Work, sizes: OpenSizes, as_float: bool = False) -> Forward:
        """The microseconds of one forward by kind of kernel, and how many kernels quantize."""
        found = Forward()
        quantized: set[object] = set()
        for matmul in work.matmuls:
            problem = self.settled(matmul, as_float).problem
            tokens = matmul.tokens(sizes)
            seen = self.cards.tokens(matmul, tokens)
            found.matmuls += self.matmul_us(problem, seen)
            size = FLOAT_BYTES[problem.dtype]
            activation = problem.scheme.activation
            if activation is not None and matmul.input not in quantized:
                quantized.add(matmul.input)
                rows = seen * problem.top_k if problem.experts else seen
                moved = rows * problem.k * (size + activation.bits / 8)
                found.quantizers += self._vector_us(moved)
                found.quantizing_kernels += 1
            if matmul.side == "rows":
                reduced = tokens * problem.n * size
                found.collectives += self.cards.collective_us(reduced, self.achieved)
            if problem.experts and self.cards.experts > 1:
                sent = tokens * problem.top_k * problem.k * size / 2  # to the expert, not back
                found.collectives += self.cards.collective_us(sent, self.achieved)
        size = FLOAT_BYTES[work.matmuls[0].problem.dtype]
        found.attention = sum(self._attention_us(a, sizes, size) for a in work.attentions)
        found.vector_ops = sum(self._other_us(v, sizes, size) for v in work.vectors)
        return found

    def _attention_us(self, work: AttentionWork, sizes: OpenSizes, size: int) -> float:
        query, key, value = (sizes.shape(n) for n in (work.query, work.key, work.value))
        new, past = sizes.given["seq"], sizes.given["past"]
        seen = past + (new + 1) / 2  # a token sees those before it, on average half of the new
        if work.window:
            seen = min(seen, float(work.window))
        sequences, heads = query[0], query[1]
        kept = min(key[-2], work.window) if work.window else key[-2]
        moved = sequences * kept * (key[1] * key[-1] + value[1] * value[-1])
        moved += sequences * heads * new * (query[-1] + value[-1])
        each = self.cards.tensor
        machine = machine_of(self.target)
        known = constants_of("gqa", machine)
        waves = math.ceil(sequences * heads / each / machine["cube_cores"])
        width = max((query[-1] + value[-1]) / 2, SCORE_WIDTH)
        cycles = new * seen / SCORES * width / SCORE_WIDTH * known["score_cycles"]
        # One new token is no matrix: its products run beside what is read for them.
        multiplying = waves * cycles / machine["clock_mhz"] if new > 1 else 0.0
        return known["start_us"] + max(self._moving_us(moved * size / each), multiplying)

    def _other_us(self, work: VectorWork, sizes: OpenSizes, size: int) -> float:
        elements = sum(sizes.count(n) for n in (*work.reads, *work.writes))
        return self._vector_us(elements * size / (self.cards.tensor if work.divided else 1))


@dataclass
class Forward:
    """Microseconds of a device, by kind of kernel. `quantizing_kernels` is a number of kernels."""

    matmuls: float = 0.0
    attention: float = 0.0
    vector_ops: float = 0.0
    quantizers: float = 0.0
    collectives: float = 0.0
    quantizing_kernels: int = 0

    @property
    def us(self) -> float:
        """All of it: one stream runs kernels one after another."""
        return sum(self.parts.values())

    @property
    def parts(self) -> Mapping[str, float]:
        """By kind of kernel, in microseconds."""
        kinds = ("matmuls", "attention", "vector_ops", "quantizers", "collectives")
        return {kind: getattr(self, kind) for kind in kinds}
