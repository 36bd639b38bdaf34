"""CANN's quantized matmuls as published timings spell them: the lowering's own cost of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.cost.model import cost
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.call import VendorCall
from panguq.lowering.problem import Candidate, Dtype, MatmulProblem
from panguq.lowering.target import Cost

_FLOATS = ("float16", "bfloat16")


def problem_of(call: VendorCall) -> tuple[Candidate, MatmulProblem]:
    """The matmul of a call of `quant_matmul` (x `[m, k]`, weight `[k, n]`, scale, offset, a scale
    per token, bias) or `weight_quant_batch_matmul`. Raises ValueError for other sizes or dtypes."""
    (*rows, k), (inputs, n) = call.shape(0), call.shape(1)
    if k != inputs:
        raise ValueError(f"x has {k} inputs and the weight {inputs}")
    m = 1
    for size in rows:
        m *= size
    if call.dtypes[1] != "int8":
        raise ValueError(f"the weight is {call.dtypes[1]}: only int8 weights were timed")
    if call.op == "quant_matmul":
        dtype = call.attrs.get("output_dtype")
        scheme = SCHEMES["W8A8_DYNAMIC" if call.has(4) else "W8A8"]
        kernel, what = "npu_quant_matmul", "output_dtype"
    else:
        dtype, scheme = call.dtypes[0], SCHEMES["W8A16"]
        kernel, what = "npu_weight_quant_batchmatmul", "x"
    if dtype not in _FLOATS:
        raise ValueError(f"{what} is {dtype}, not float16 or bfloat16")
    problem = MatmulProblem(m, n, k, scheme, dtype=cast(Dtype, dtype), biased=call.has(5))
    return Candidate(kernel, storage="int8"), problem


def matmul_cost(call: VendorCall, machine: AscendMachine) -> Cost:
    """What the lowering expects the call to take. Raises ValueError as `problem_of` does."""
    candidate, problem = problem_of(call)
    return cost(candidate, problem, machine)


MATMULS: Mapping[str, str] = {
    "quant_matmul": "CANN's W8A8 matmul, as the lowering prices it",
    "weight_quant_batch_matmul": "CANN's W8A16 matmul, as the lowering prices it",
}
