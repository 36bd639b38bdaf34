"""Which kernel a lowered matmul runs, and its predicted time, as text to stand beside its node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import fx

from panguq.ir.edit import op_name
from panguq.ir.node_meta import meta_of
from panguq.ir.ops.opset import name_of
from panguq.ir.quant_spec import Scheme
from panguq.ir.views import argument, operand
from panguq.kernels.ascend.vendor.int4pack import CODES_PER_WORD
from panguq.lowering.cost.model import M, cost, cost_us
from panguq.lowering.dispatch import NO_LIMIT, parse_kernel, row_for
from panguq.lowering.problem import Candidate, Dtype, MatmulProblem
from panguq.lowering.select_kernel import MANY_TOKENS, cpu_cost_name
from panguq.lowering.target import Target
from panguq.lowering.targets import find_target
from panguq.tensors.dtypes import dtype_name

TOKENS = (1, 16, 512)  # decoding one and several sequences, and a prompt
_DISPATCH = "panguq.dispatch_matmul.default"
_OWN = ("panguq_npu.w4a16.default", "panguq_npu.w8a8.default")
_VENDOR = ("npu.npu_quant_matmul.default", "npu.npu_weight_quant_batchmatmul.default")
_CPU = (
    "panguq_cpu.dequantized_linear.default", "panguq_cpu.int4_linear.default",
    "panguq_cpu.int8_linear.default", "panguq_cpu.int8_weight_linear.default",
)  # fmt: skip


class KernelNotes:
    """`panguq.kernel`, `.schedule`, `.splits`, `.tile` and `.predicted_us` of a matmul's node.

    A dispatch has one line a row of its table: `m <= 64: w4a16_split_k splits=8 tile=16x128x256`.
    Times are the cost model's for m = 1, 16 and 512 tokens, in microseconds; they are left out
    without a target.
    """

    def __init__(self, target: str | None) -> None:
        self.target = None if target is None else find_target(target)

    def __call__(self, node: fx.Node) -> Mapping[str, str]:
        op = name_of(node.target)
        scheme = _scheme(node)
        if op in _CPU:
            return {**_scheme_note(scheme), "panguq.kernel": op_name(node), **self._cpu(node)}
        table = _table(node, op)
        if not table:
            return {}
        notes = {**_scheme_note(scheme), **_kernel_notes(table)}
        if self.target is not None and self.target.kind == "ascend" and scheme is not None:
            problem = _problem(node, scheme)
            notes["panguq.predicted_us"] = _predicted(table, problem, self.target)
        return notes

    def _cpu(self, node: fx.Node) -> dict[str, str]:
        scheme, kernel = _scheme(node), op_name(node)
        if self.target is None or self.target.kind != "cpu" or scheme is None:
            return {}
        n = int(node.meta["val"].shape[-1])
        k = int(_source(node).meta["val"].shape[-1])
        problem = MatmulProblem(None, n, k, scheme)
        parts = []
        for m in TOKENS:
            few_tokens = int(argument(node, -1)) if kernel in MANY_TOKENS else 0
            variant = cpu_cost_name(kernel, few_tokens, m)
            microseconds = float(cost_us(variant, problem, self.target).subs(M, m))
            parts.append(f"m={m}: {microseconds:.1f}")
        return {"panguq.predicted_us": "; ".join(parts)}


def kernel_notes(target: str | None) -> KernelNotes:
    """The notes of a graph that was lowered for `target`. Raises LoweringError if unknown."""
    return KernelNotes(target)


def _source(node: fx.Node) -> fx.Node:
    return operand(node, 0)


def _scheme(node: fx.Node) -> Scheme | None:
    """The scheme of the matmul; of a kernel's call, that of the view or sum that ends it."""
    for _ in range(4):
        scheme = meta_of(node).scheme
        if scheme is not None:
            return scheme
        if not node.users:
            return None
        node = next(iter(node.users))
    return None


def _scheme_note(scheme: Scheme | None) -> dict[str, str]:
    return {} if scheme is None else {"panguq.scheme": scheme.name}


def _table(node: fx.Node, op: str | None) -> list[tuple[int, Candidate]]:
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
    n *= CODES_PER_WORD if weight.dtype == torch.int32 else 1
    dtype = cast(Dtype, dtype_name(node.meta["val"].dtype))
    return MatmulProblem(None, n, k, scheme, dtype=dtype)


def _predicted(table: list[tuple[int, Candidate]], problem: MatmulProblem, target: Target) -> str:
    parts = []
    for m in TOKENS:
        kernel = table[row_for([last for last, _ in table], m)][1]
        found = cost(kernel, replace(problem, m=m), target).total_us
        parts.append(f"m={m}: {found:.1f}")
    return "; ".join(parts)
