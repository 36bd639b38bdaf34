"""What the matmuls of a mixture's experts cost on an NPU, for the rows that each expert gets.

How many rows an expert gets is not known before a model runs: `typical_rows` is what independent
tokens make of it. The price is that of CANN's grouped matmul (`op_times/routed.py`), whose
constants are fitted to published times of float matmuls; those of other schemes count what they
move and multiply, and were not timed. All numbers rank and inform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.special import gammaln

from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.cost.executions import scheme_numbers
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times import routed
from panguq.lowering.ascend.op_times.price import constants_of
from panguq.lowering.problem import FLOAT_BYTES, MatmulProblem
from panguq.lowering.target import Cost


def typical_rows(tokens: int, top_k: int, experts: int) -> list[int]:
    """Rows of each expert when every token chooses by itself, any expert as likely as another.

    An expert's number is binomial; the list holds its quantiles, one an expert, most rows first. It
    adds up to tokens * top_k.
    """
    share = top_k / experts
    if share >= 1:
        return [tokens] * experts
    found = np.arange(tokens + 1)
    log = gammaln(tokens + 1) - gammaln(found + 1) - gammaln(tokens - found + 1)
    chance = np.exp(log + found * math.log(share) + (tokens - found) * math.log1p(-share))
    middles = (np.arange(experts) + 0.5) / experts
    rows = np.searchsorted(chance.cumsum(), middles).clip(0, tokens)[::-1].astype(int)
    # Rounding leaves a few rows over or too many, which go to or come from those in the middle.
    missing, step = tokens * top_k - int(rows.sum()), experts // 2
    while missing:
        change = int(np.sign(missing))
        if 0 <= rows[step % experts] + change <= tokens:
            rows[step % experts] += change
            missing -= change
        step += 1
    return [int(count) for count in np.sort(rows)[::-1]]


def grouped_cost(rows: Sequence[int], problem: MatmulProblem, target: AscendMachine) -> Cost:
    """What `npu_grouped_matmul` costs; `problem` is one expert's, its m is not read.

    Weight-only: CANN's kernel first writes the weights of all experts that have rows as floats, and
    reads them again; the cube then multiplies 16-bit numbers.
    """
    weight = problem.scheme.weight
    weight_only = weight is not None and problem.scheme.activation is None
    floats = replace(problem, scheme=SCHEMES["FLOAT"])
    numbers = scheme_numbers(floats if weight_only else problem, target)
    stored, scales = numbers["stored_bytes"], numbers["scale_bytes"]
    if weight is not None:
        stored = weight.bits / 8
    if weight_only:
        scales = FLOAT_BYTES[problem.dtype] * 2 / problem.group_size  # an offset beside each scale
    work = routed.GroupedWork(
        n=problem.n,
        k=problem.k,
        x_bytes=numbers["x_bytes"],
        stored_bytes=stored + scales,
        loaded_bytes=numbers["cube_bytes"],
        output_bytes=numbers["output_bytes"],
        fractal_k=numbers["fractal_k"],
        x_parts=numbers["x_parts"],
    )
    constants = constants_of("grouped_matmul", target)
    found = routed.rows_cost(rows, work, target, constants)
    if not weight_only:
        return found
    active = sum(count > 0 for count in rows)
    written = active * problem.n * problem.k * numbers["cube_bytes"]
    us = 2 * written / constants["memory_gb_per_s"] / 1000
    return replace(found, total_us=found.total_us + us, terms={**found.terms, "dequantize": us})
