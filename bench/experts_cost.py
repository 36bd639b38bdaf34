"""What tokens an expert do to a layer of Qwen3-30B-A3B on 910B2, by the cost model of experts.

    python -m bench.experts_cost

Nothing runs on an NPU. Errors against published times of grouped matmuls: `bench.op_times`.
"""

from __future__ import annotations

from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.cost.experts import grouped_cost, typical_rows
from panguq.lowering.problem import MatmulProblem
from panguq.lowering.targets import find_target

TARGET = find_target("ascend910b2")


def extreme_rows(tokens: int, top_k: int, experts: int) -> tuple[list[int], list[int]]:
    """All tokens with the same experts, and rows spread over as many experts as there can be."""
    rows = tokens * top_k
    spread = [rows // experts + (expert < rows % experts) for expert in range(experts)]
    return [tokens] * top_k + [0] * (experts - top_k), spread


def layer(tokens: int, scheme: str) -> tuple[float, float, float]:
    """Microseconds of gate and up projection of Qwen3-30B-A3B, 128 experts of which 8 are chosen:
    typical rows, all tokens with the same experts, rows spread evenly."""
    problem = MatmulProblem(None, 1536, 2048, SCHEMES[scheme], dtype="bfloat16")
    kinds = (typical_rows(tokens, 8, 128), *extreme_rows(tokens, 8, 128))
    first, second, third = (grouped_cost(rows, problem, TARGET).total_us for rows in kinds)
    return first, second, third


def main() -> None:
    """Print the table."""
    print("| tokens | scheme | typical us | same experts us | spread us |\n|---|---|---|---|---|")
    for scheme in ("FLOAT", "W8A8_DYNAMIC", "W4A16", "W4A8"):
        for tokens in (1, 16, 256, 4096):
            times = " | ".join(f"{us:.0f}" for us in layer(tokens, scheme))
            print(f"| {tokens} | {scheme} | {times} |")


if __name__ == "__main__":
    main()
