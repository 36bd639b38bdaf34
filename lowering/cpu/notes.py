"""What a call of a CPU kernel says of itself beside its node in another format."""

from __future__ import annotations

from torch import fx

from panguq.ir.call_arguments import argument, operand
from panguq.ir.edit import op_name
from panguq.ir.ops.opset import name_of
from panguq.ir.quant_spec import Scheme
from panguq.lowering.choice import NOTED_TOKENS
from panguq.lowering.cpu.cost import MANY_TOKENS, M, cost_us, cpu_cost_name
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.target import Target

_KERNELS = (
    "panguq_cpu.dequantized_linear.default", "panguq_cpu.int4_linear.default",
    "panguq_cpu.int8_linear.default", "panguq_cpu.int8_weight_linear.default",
)  # fmt: skip


def cpu_notes(node: fx.Node, scheme: Scheme | None, target: Target | None) -> dict[str, str]:
    """The kernel, and its predicted time if the target and the scheme are known."""
    if name_of(node.target) not in _KERNELS:
        return {}
    found = {"panguq.kernel": op_name(node)}
    if target is not None and scheme is not None:
        found["panguq.predicted_us"] = _predicted(node, scheme, target)
    return found


def _predicted(node: fx.Node, scheme: Scheme, target: Target) -> str:
    kernel = op_name(node)
    n = int(node.meta["val"].shape[-1])
    k = int(operand(node, 0).meta["val"].shape[-1])
    problem = MatmulProblem(None, n, k, scheme)
    parts = []
    for m in NOTED_TOKENS:
        few_tokens = int(argument(node, -1)) if kernel in MANY_TOKENS else 0
        variant = cpu_cost_name(kernel, few_tokens, m)
        microseconds = float(cost_us(variant, problem, target).subs(M, m))
        parts.append(f"m={m}: {microseconds:.1f}")
    return "; ".join(parts)
