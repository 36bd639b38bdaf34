"""What a call of an NPU kernel says of itself beside its node in another format."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import fx

from panguq.ir.call_arguments import argument, operand
from panguq.ir.edit import op_name
from panguq.ir.ops.opset import name_of
from panguq.ir.quant_spec import Scheme
from panguq.lowering.ascend.cost.model import cost
from panguq.lowering.ascend.dispatch import CODES_OF_WORD, NO_LIMIT, parse_kernel, row_for
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.choice import NOTED_TOKENS
from panguq.lowering.problem import Candidate, Dtype, MatmulProblem
from panguq.tensors.dtypes import dtype_name

_DISPATCH = "panguq.dispatch_matmul.default"
_OWN = ("panguq_npu.w4a16.default", "panguq_npu.w8a8.default")
_VENDOR = ("npu.npu_quant_matmul.default", "npu.npu_weight_quant_batchmatmul.default")


def ascend_notes(
    node: fx.Node, scheme: Scheme | None, target: AscendMachine | None
) -> dict[str, str]:
    """The kernel or the table of kernels, and their predicted times if the target and the scheme
    are known."""
    table = _table(node)
    if not table:
        return {}
    found = _kernel_notes(table)
    if target is not None and scheme is not None:
        found["panguq.predicted_us"] = _predicted(table, _problem(node, scheme), target)
    return found


def _table(node: fx.Node) -> list[tuple[int, Candidate]]:
    op = name_of(node.target)
    if op == _DISPATCH:
        last_m, kernels = argument(node, -2), argument(node, -1)
        return [(m, _with_schedule(parse_kernel(k))) for m, k in zip(last_m, kernels, strict=True)]
    if op in _OWN:
        splits = int(argument(node, -2))
        block_m, block_n, block_k = argument(node, -1)
        kernel = f"{op_name(node)}_{'split_k' if splits > 1 else 'data_parallel'}"
        candidate = Candidate(kernel, splits=splits, tile=(block_m, block_n, block_k))
        return [(NO_LIMIT, _with_schedule(candidate))]
    return [(NO_LIMIT, Candidate(op_name(node)))] if op in _VENDOR else []


def _with_schedule(kernel: Candidate) -> Candidate:
    for schedule in ("data_parallel", "split_k"):
        if kernel.kernel.endswith(schedule):
            return Candidate(
                kernel.kernel,
                schedule=schedule,
                splits=kernel.splits,
                tile=kernel.tile,
            )
    return kernel


def _kernel_notes(table: list[tuple[int, Candidate]]) -> dict[str, str]:
    if len(table) == 1:
        kernel = table[0][1]
        notes = {"panguq.kernel": kernel.kernel, "panguq.schedule": kernel.schedule}
        if kernel.schedule != "vendor":
            notes["panguq.splits"] = str(kernel.splits)
            notes["panguq.tile"] = "x".join(map(str, kernel.tile or ()))
        return notes
    rows, first = [], 1
    for last, kernel in table:
        limit = f"m >= {first}" if last == NO_LIMIT else f"m <= {last}"
        rows.append((limit, kernel))
        first = last + 1
    return {
        "panguq.kernel": "; ".join(f"{limit}: {kernel}" for limit, kernel in rows),
        "panguq.schedule": "; ".join(f"{limit}: {kernel.schedule}" for limit, kernel in rows),
        "panguq.splits": "; ".join(f"{limit}: {kernel.splits}" for limit, kernel in rows),
    }


def _problem(node: fx.Node, scheme: Scheme) -> MatmulProblem:
    weight = operand(node, 1).meta["val"]
    k, n = (int(size) for size in weight.shape)
    n *= CODES_OF_WORD.get(weight.dtype, 1)
    dtype = cast(Dtype, dtype_name(node.meta["val"].dtype))
    return MatmulProblem(None, n, k, scheme, dtype=dtype)


def _predicted(
    table: list[tuple[int, Candidate]], problem: MatmulProblem, target: AscendMachine
) -> str:
    parts = []
    for m in NOTED_TOKENS:
        kernel = table[row_for([last for last, _ in table], m)][1]
        found = cost(kernel, replace(problem, m=m), target).total_us
        parts.append(f"m={m}: {found:.1f}")
    return "; ".join(parts)
