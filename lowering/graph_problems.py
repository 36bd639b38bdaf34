"""The matmuls of a graph as problems for the kernel selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from torch import fx

from panguq.ir.call_arguments import operand
from panguq.ir.quant_spec import Scheme
from panguq.ir.views import DequantizedWeight, ExpertLinear, Item, Linear
from panguq.lowering.problem import Dtype, MatmulProblem, Precision
from panguq.tensors.dtypes import dtype_name

PART_MULTIPLE = 64


def output_parts(node: fx.Node, largest_n: int | None) -> list[slice]:
    """The rows of the weight that one call computes: all of them where they are few enough."""
    n = Linear.of(node).shape[0]
    if largest_n is None or n <= largest_n:
        return [slice(None)]
    parts = -(-n // largest_n)
    size = -(-n // (parts * PART_MULTIPLE)) * PART_MULTIPLE
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def matmul_problem(
    node: fx.Node,
    scheme: Scheme,
    precision: Precision = "bfloat16",
    largest_n: int | None = None,
    members: Sequence[int] = (),
) -> MatmulProblem:
    """This linear under a scheme, for any m; the first of its parts if it has more outputs than
    `largest_n`. `members`: only these of its experts."""
    n, k = Linear.of(node).shape
    part = output_parts(node, largest_n)[0]
    n = n if part.start is None else part.stop - part.start
    dtype = cast(Dtype, dtype_name(Linear.of(node).input.meta["val"].dtype))
    problem = MatmulProblem(None, n, k, scheme, precision, dtype, mixed=_has_mixed_codes(node))
    experts = ExpertLinear.match(node)
    if experts is None:
        return problem
    route = Item.match(experts.counts)
    top_k = 1 if route is None else int(operand(route.source, 0).meta["val"].shape[-1])
    every, count = int(experts.counts.meta["val"].shape[0]), len(members) or experts.experts
    if count < every:  # of a token's experts, as many as these are of all
        top_k = max(1, round(top_k * count / every))
    return replace(problem, experts=count, top_k=top_k, biased=experts.bias is not None)


def _has_mixed_codes(node: fx.Node) -> bool:
    """Whether the weight's codes are stored group by group, each in a width of its own."""
    weight = DequantizedWeight.match(Linear.of(node).weight)
    return weight is not None and weight.format is None
