"""The matmuls among timed ops, as problems for the cost model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import cast

from panguq.ir.quant_spec import SCHEMES, Scheme, parse_scheme
from panguq.lowering.ascend.tuning.table import OpRow, TensorShape
from panguq.lowering.problem import FLOAT_BYTES, FLOAT_OP, Dtype, MatmulProblem, WeightFormat

_FLOAT_OPS = ("MatMul", "MatMulV2", "MatMulV3", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
_INTEGER_OPS = ("QuantBatchMatmul", "QuantBatchMatmulV3", "QuantBatchMatmulV4")
_WEIGHT_ONLY_OPS = ("WeightQuantBatchMatmul", "WeightQuantBatchMatmulV2")
_BITS = {"int8": 8, "int4": 4, "int32": 4}  # 8 codes of 4 bits in an int32
_BY_BITS = {(8, 8): "W8A8", (4, 8): "W4A8", (4, 4): "W4A4"}


@dataclass(frozen=True)
class MatmulTiming:
    """A matmul and the median of its times. `problem` has its m; `kernel` is the op that panguq
    calls for it; `op` is what the table calls it; `calls`: how many rows."""

    op: str
    kernel: str
    problem: MatmulProblem
    us: float
    calls: int


def matmul_timings(rows: Iterable[OpRow]) -> tuple[list[MatmulTiming], dict[str, int]]:
    """The matmuls, each shape once, and the other rows counted by why they are none."""
    times: dict[tuple[str, str, MatmulProblem], list[float]] = defaultdict(list)
    others: dict[str, int] = defaultdict(int)
    for row in rows:
        found = _matmul(row)
        if isinstance(found, str):
            others[found] += 1
        else:
            times[row.op, *found].append(row.us)
    timings = [MatmulTiming(*key, median(us), len(us)) for key, us in times.items()]
    return timings, dict(others)


def _matmul(row: OpRow) -> tuple[str, MatmulProblem] | str:
    if row.op in _FLOAT_OPS:
        kernel, scheme = FLOAT_OP, SCHEMES["FLOAT"]
    elif row.op in _INTEGER_OPS:
        kernel = "npu_quant_matmul"
        bits = tuple(_BITS.get(dtype, 0) for dtype in (row.dtypes[1:2] + row.dtypes[:1]))
        if bits not in _BY_BITS:
            return f"{row.op} of {' and '.join(row.dtypes[:2])}: panguq has no such matmul"
        scheme = SCHEMES[_BY_BITS[bits]]
    elif row.op in _WEIGHT_ONLY_OPS:
        kernel = "npu_weight_quant_batchmatmul"
        width = _BITS.get(row.dtypes[1]) if len(row.dtypes) > 1 else None
        if width is None:
            return f"{row.op} of {' and '.join(row.dtypes[:2])}: panguq has no such matmul"
        scheme = SCHEMES[f"W{width}A16"]
    else:
        return f"{row.op}: no matmul of one weight"
    sizes = _sizes(row)
    if isinstance(sizes, str):
        return f"{row.op}: {sizes}"
    m, n, k = sizes
    if row.op in _WEIGHT_ONLY_OPS and scheme.name == "W4A16":
        scheme = _grouped(scheme, row, n, k)
    dtype = (row.dtypes if row.op not in _INTEGER_OPS else row.out_dtypes or ("bfloat16",))[0]
    if dtype not in FLOAT_BYTES:
        return f"{row.op} in {dtype}: panguq has no such matmul"
    blocked = len(row.formats) > 1 and "NZ" in row.formats[1].upper() and not scheme.is_float
    layout: WeightFormat = "NZ" if blocked else "ND"
    problem = MatmulProblem(m, n, k, scheme, dtype=cast(Dtype, dtype), weight_format=layout)
    try:
        _ = problem.group_size
    except ValueError as error:
        return f"{row.op}: {error}"
    return kernel, replace(problem, own_kernels=False)


def _sizes(row: OpRow) -> tuple[int, int, int] | str:
    """m, n and k of `x [.., m, k]` and a weight `[k, n]`, `[n, k]`, or either in blocks."""
    if len(row.shapes) < 2 or len(row.shapes[0]) < 2 or not row.shapes[1]:
        return "its inputs are no two matrices"
    x, weight = row.shapes[:2]
    if row.formats[:1] and "NZ" in row.formats[0].upper():
        return "its first input is stored in blocks"
    k, m = x[-1], math.prod(x[:-1])
    packed = 8 if row.dtypes[1:2] == ("int32",) else 1
    total = math.prod(weight) * packed
    if "NZ" in (row.formats[1].upper() if len(row.formats) > 1 else ""):
        n = row.out_shapes[0][-1] if row.out_shapes and row.out_shapes[0] else total // k
        return (m, n, k) if n else "its sizes do not fit each other"
    if len(weight) > 2 and math.prod(weight[:-2]) > 1:
        return "it has a weight for each of a batch"
    matrix: TensorShape = weight[-2:]
    if len(matrix) < 2 or (k not in matrix and k not in (matrix[0], matrix[1] * packed)):
        return "its sizes do not fit each other"
    return m, max(1, total // k), k


def _grouped(scheme: Scheme, row: OpRow, n: int, k: int) -> Scheme:
    """Out of the scales' shape, `[k / group, n]`."""
    scales = math.prod(row.shapes[2]) if len(row.shapes) > 2 and row.shapes[2] else n
    groups = max(1, scales // n)
    size = k // groups
    if groups == 1:
        return parse_scheme("W4A16-per_channel")
    return parse_scheme(f"W4A16-g{size}") if size in (32, 64, 128, 256) else scheme
