"""W8A8 matmul: int8 products summed in int32 on the cube core, scaled on the vector core.

Launched by `launch.py`. x int8 [m, k]; weight int8 [k, n]; scale float32 [n]; pertoken_scale
float32 [m]; bias int32 or float32 [n]; all contiguous.
"""

# mypy: ignore-errors
# A kernel is Triton's language, which only looks like Python.

import triton
import triton.language as tl

from panguq.kernels.ascend.own.triton.split_k import add_partials, arrives_last, lower_flags


@triton.jit
def _sum_over_k(
    x_ptr,
    weight_ptr,
    rows,
    columns,
    m,
    n,
    k,
    first_block,
    last_block,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """int32 [BLOCK_M, BLOCK_N]: the products of blocks first_block .. last_block - 1 of k."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for block in range(first_block, last_block):
        inputs = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * k + inputs[None, :],
            mask=(rows[:, None] < m) & (inputs[None, :] < k),
            other=0,
        )
        weight = tl.load(
            weight_ptr + inputs[:, None] * n + columns[None, :],
            mask=(inputs[:, None] < k) & (columns[None, :] < n),
            other=0,
        )
        total = tl.dot(x, weight, total, out_dtype=tl.int32)
    return total


@triton.jit
def _scaled(
    total,
    scale_ptr,
    pertoken_scale_ptr,
    bias_ptr,
    rows,
    columns,
    m,
    n,
    HAS_PERTOKEN_SCALE: tl.constexpr,
    HAS_INT32_BIAS: tl.constexpr,
    HAS_FLOAT_BIAS: tl.constexpr,
):
    """(int32 sums + int32 bias) * scale * pertoken_scale + float bias, in float32."""
    if HAS_INT32_BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < n, other=0)[None, :]
    scale = tl.load(scale_ptr + columns, mask=columns < n, other=0.0)
    result = total.to(tl.float32) * scale[None, :]
    if HAS_PERTOKEN_SCALE:
        result *= tl.load(pertoken_scale_ptr + rows, mask=rows < m, other=0.0)[:, None]
    if HAS_FLOAT_BIAS:
        result += tl.load(bias_ptr + columns, mask=columns < n, other=0.0)[None, :]
    return result


@triton.jit
def w8a8_data_parallel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    pertoken_scale_ptr,
    bias_ptr,
    result_ptr,
    m,
    n,
    k,
    HAS_PERTOKEN_SCALE: tl.constexpr,
    HAS_INT32_BIAS: tl.constexpr,
    HAS_FLOAT_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks of m, blocks of n): result [m, n] in its own dtype."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks = tl.cdiv(k, BLOCK_K)
    total = _sum_over_k(
        x_ptr, weight_ptr, rows, columns, m, n, k, 0, blocks, BLOCK_M, BLOCK_N, BLOCK_K
    )
    result = _scaled(
        total,
        scale_ptr,
        pertoken_scale_ptr,
        bias_ptr,
        rows,
        columns,
        m,
        n,
        HAS_PERTOKEN_SCALE,
        HAS_INT32_BIAS,
        HAS_FLOAT_BIAS,
    )
    tl.store(
        result_ptr + rows[:, None] * n + columns[None, :],
        result.to(result_ptr.dtype.element_ty),
        mask=(rows[:, None] < m) & (columns[None, :] < n),
    )


@triton.jit
def w8a8_split_k(
    x_ptr,
    weight_ptr,
    scale_ptr,
    pertoken_scale_ptr,
    bias_ptr,
    partials_ptr,
    flags_ptr,
    result_ptr,
    m,
    n,
    k,
    splits,
    HAS_PERTOKEN_SCALE: tl.constexpr,
    HAS_INT32_BIAS: tl.constexpr,
    HAS_FLOAT_BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks of m, blocks of n, splits): result [m, n] by way of int32 [splits, m, n]."""
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    blocks = tl.cdiv(k, BLOCK_K)
    # The same partition as panguq.kernels.ascend.own.tiles.split_bounds.
    first, last = split * blocks // splits, (split + 1) * blocks // splits
    total = _sum_over_k(
        x_ptr, weight_ptr, rows, columns, m, n, k, first, last, BLOCK_M, BLOCK_N, BLOCK_K
    )
    tl.store(
        partials_ptr + split * m * n + rows[:, None] * n + columns[None, :],
        total,
        mask=(rows[:, None] < m) & (columns[None, :] < n),
    )
    if arrives_last(
        partials_ptr, flags_ptr, first_column, n, m, n, split, splits, FLAGS, COUNTED, BLOCK_M
    ):
        for part in range(0, BLOCK_M, ROWS):
            some = first_row + part + tl.arange(0, ROWS)
            places = some[:, None] * n + columns[None, :]
            inside = (some[:, None] < m) & (columns[None, :] < n)
            summed = add_partials(partials_ptr, places, inside, m, n, splits)
            result = _scaled(
                summed,
                scale_ptr,
                pertoken_scale_ptr,
                bias_ptr,
                some,
                columns,
                m,
                n,
                HAS_PERTOKEN_SCALE,
                HAS_INT32_BIAS,
                HAS_FLOAT_BIAS,
            )
            tl.store(result_ptr + places, result.to(result_ptr.dtype.element_ty), mask=inside)
        lower_flags(flags_ptr, splits, FLAGS)
