"""The kernel of experts: there is one, so that only its cost and its format are found."""

from __future__ import annotations

from panguq.lowering.ascend.candidates import ascend_candidates
from panguq.lowering.ascend.cost.experts import grouped_cost, typical_rows
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.choice import DECODE_M, PREFILL_M, Choice, TableEntry, TokenMix
from panguq.lowering.problem import MatmulProblem


def select_experts(problem: MatmulProblem, target: AscendMachine, mix: TokenMix) -> Choice:
    """The grouped matmul, with what it costs for typical rows.

    Raises LoweringError, with the op's refusal, if it does not take them.
    """
    (winner,) = target.legal(ascend_candidates(problem, target), problem)
    weights = mix.weights() if problem.m is None else {problem.m: 1.0}
    total = sum(weight * typical_us(m, problem, target) for m, weight in weights.items())
    ends = (DECODE_M, PREFILL_M) if problem.m is None else (problem.m, problem.m)
    decode_us, prefill_us = (typical_us(m, problem, target) for m in ends)
    return Choice(
        kernel=winner.kernel,
        precision=problem.precision,
        few_tokens=0,
        losers=(),
        decode_us=decode_us,
        prefill_us=prefill_us,
        storage=winner.storage,
        table=(TableEntry(1, None, winner),),
        storage_us=((winner.storage, total),),
        weight_format=problem.weight_format,
    )


def typical_us(tokens: int, problem: MatmulProblem, target: AscendMachine) -> float:
    """Microseconds of all experts' matmuls for so many tokens."""
    rows = typical_rows(tokens, problem.top_k, problem.experts)
    return grouped_cost(rows, problem, target).total_us
