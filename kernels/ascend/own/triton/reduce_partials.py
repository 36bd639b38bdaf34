"""The second step of Split-K: partial sums added in a fixed order, then scales and bias.

The order 0 .. splits - 1 makes float32 results the same bits in every run, which adding to the
result by atomics would not.
"""

# mypy: ignore-errors
# A kernel is Triton's language, which only looks like Python.

import triton
import triton.language as tl


@triton.jit
def reduce_partials(
    partials_ptr,
    scale_ptr,
    pertoken_scale_ptr,
    bias_ptr,
    result_ptr,
    m,
    n,
    splits,
    HAS_SCALE: tl.constexpr,
    HAS_PERTOKEN_SCALE: tl.constexpr,
    HAS_INT32_BIAS: tl.constexpr,
    HAS_FLOAT_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (blocks of m, blocks of n): partials float32 or int32 [splits, m, n] -> result [m, n].

    scale float32 [n], pertoken_scale float32 [m], bias [n].
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = rows[:, None] * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=partials_ptr.dtype.element_ty)
    for split in range(splits):
        total += tl.load(partials_ptr + split * m * n + places, mask=inside, other=0)
    if HAS_INT32_BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < n, other=0)[None, :]
    result = total.to(tl.float32)
    if HAS_SCALE:
        result *= tl.load(scale_ptr + columns, mask=columns < n, other=0.0)[None, :]
    if HAS_PERTOKEN_SCALE:
        result *= tl.load(pertoken_scale_ptr + rows, mask=rows < m, other=0.0)[:, None]
    if HAS_FLOAT_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < n, other=0.0)
        result += bias.to(tl.float32)[None, :]
    tl.store(result_ptr + places, result.to(result_ptr.dtype.element_ty), mask=inside)
