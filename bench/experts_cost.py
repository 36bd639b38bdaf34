"""The cost model of mixtures of experts against published times of kernels: every error.

    python -m bench.experts_cost

Nothing runs on an NPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.timings import read
from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.cost.experts import (
    combine_us,
    extreme_rows,
    grouped_cost,
    route_us,
    typical_rows,
)
from panguq.lowering.problem import FLOAT_BYTES, Dtype, MatmulProblem
from panguq.lowering.targets import find_target

# Fitted to the 7 fused int8 matmuls, whose weight is laid out anew in their time. A lowered graph
# does this once, at loading.
LAYOUT_US_PER_MB = 2.4
TARGET = find_target("ascend910b2")
_SIZES = {"int8": 1, **FLOAT_BYTES}


class Comparison(NamedTuple):
    """An op on its sizes: microseconds published and predicted."""

    what: str
    us: float
    predicted: float

    @property
    def error(self) -> float:
        """The prediction's relative error."""
        return self.predicted / self.us - 1


def grouped() -> Iterator[Comparison]:
    """Float grouped matmuls, and int8 ones with SwiGLU."""
    for row in read("grouped_matmuls.csv"):
        parts = [part.split("x") for part in row["rows"].split()]
        rows = [int(count) for count, experts in parts for _ in range(int(experts))]
        k, n, dtype = int(row["k"]), int(row["n"]), row["dtype"]
        fused = dtype == "int8"
        name: Dtype = "bfloat16" if fused else dtype  # type: ignore[assignment]
        scheme = SCHEMES["W8A8_DYNAMIC" if fused else "FLOAT"]
        found = grouped_cost(rows, MatmulProblem(None, n, k, scheme, dtype=name), TARGET).total_us
        if fused:
            found += LAYOUT_US_PER_MB * len(rows) * n * k / 1e6
        what = f"{row['op']} {dtype}, rows {row['rows']}, k {k}, n {n}"
        yield Comparison(what, float(row["us"]), found)


def moved() -> Iterator[Comparison]:
    """Ops that bring rows together or add them up."""
    for row in read("moe_rows.csv"):
        rows, results = int(row["rows"]), int(row["results"])
        hidden, size = int(row["hidden"]), _SIZES[row["dtype"]]
        if row["op"] == "finalize_routing":
            skips = int(row["skips"])
            found = combine_us(results, rows // results, hidden, size, TARGET, skips)
        else:
            found = route_us(rows, 1, hidden, size, TARGET)
        what = f"{row['op']} {row['dtype']}, {rows} rows to {results}, hidden {hidden}"
        yield Comparison(what, float(row["us"]), found)


def layer(tokens: int, scheme: str) -> tuple[float, float, float]:
    """Microseconds of gate and up projection of Qwen3-30B-A3B, 128 experts of which 8 are chosen:
    typical rows, all tokens with the same experts, rows spread evenly."""
    problem = MatmulProblem(None, 1536, 2048, SCHEMES[scheme], dtype="bfloat16")
    kinds = (typical_rows(tokens, 8, 128), *extreme_rows(tokens, 8, 128))
    first, second, third = (grouped_cost(rows, problem, TARGET).total_us for rows in kinds)
    return first, second, third


def main() -> None:
    """Print both comparisons and what tokens an expert do to a layer."""
    print("| op | published us | predicted us | error |\n|---|---|---|---|")
    for found in (*grouped(), *moved()):
        print(f"| {found.what} | {found.us:.1f} | {found.predicted:.1f} | {found.error:+.0%} |")
    print("\n| tokens | scheme | typical us | same experts us | spread us |\n|---|---|---|---|---|")
    for scheme in ("FLOAT", "W8A8_DYNAMIC", "W4A16", "W4A8"):
        for tokens in (1, 16, 256, 4096):
            times = " | ".join(f"{us:.0f}" for us in layer(tokens, scheme))
            print(f"| {tokens} | {scheme} | {times} |")


if __name__ == "__main__":
    main()
