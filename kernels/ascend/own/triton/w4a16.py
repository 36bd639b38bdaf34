"""W4A16 matmul: a vector core makes a tile of the weight 16-bit, then the cube multiplies.

Launched by `launch.py`. x float16 or bfloat16 [m, k], rows contiguous; weight uint8 [k, n / 2],
the low nibble the even column; scale and offset [groups, n] in x's dtype, contiguous; bias [n].
`group_size` is a multiple of BLOCK_K, or at least k for one scale per output.
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
    scale_ptr,
    offset_ptr,
    rows,
    m,
    n,
    k,
    group_size,
    first_block,
    last_block,
    HAS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: the products of blocks first_block .. last_block - 1 of k."""
    first_column = tl.program_id(1) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    bytes_of_row = first_column // 2 + tl.arange(0, BLOCK_N // 2)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(first_block, last_block):
        inputs = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * k + inputs[None, :],
            mask=(rows[:, None] < m) & (inputs[None, :] < k),
            other=0.0,
        )
        packed = tl.load(
            weight_ptr + inputs[:, None] * (n // 2) + bytes_of_row[None, :],
            mask=(inputs[:, None] < k) & (bytes_of_row[None, :] < n // 2),
            other=0,
        )
        # Shifting an int8 right extends its sign: a nibble in two's complement becomes its value.
        even = (packed << 4).to(tl.int8, bitcast=True) >> 4
        odd = packed.to(tl.int8, bitcast=True) >> 4
        values = tl.interleave(even, odd).to(tl.float32)
        # A block of k lies in one group, so one row of scales serves all of it.
        group = block * BLOCK_K // group_size
        scale = tl.load(scale_ptr + group * n + columns, mask=columns < n, other=0.0)
        if HAS_OFFSET:
            offset = tl.load(offset_ptr + group * n + columns, mask=columns < n, other=0.0)
            values += offset.to(tl.float32)[None, :]
        values *= scale.to(tl.float32)[None, :]
        total = tl.dot(x, values.to(x.dtype), total)
    return total


@triton.jit
def w4a16_data_parallel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    result_ptr,
    m,
    n,
    k,
    group_size,
    HAS_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks of m, blocks of n): result [m, n] in x's dtype."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _sum_over_k(
        x_ptr,
        weight_ptr,
        scale_ptr,
        offset_ptr,
        rows,
        m,
        n,
        k,
        group_size,
        0,
        tl.cdiv(k, BLOCK_K),
        HAS_OFFSET,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < n, other=0.0)
        total += bias.to(tl.float32)[None, :]
    tl.store(
        result_ptr + rows[:, None] * n + columns[None, :],
        total.to(result_ptr.dtype.element_ty),
        mask=(rows[:, None] < m) & (columns[None, :] < n),
    )


@triton.jit
def w4a16_split_k(
    x_ptr,
    weight_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    partials_ptr,
    flags_ptr,
    result_ptr,
    m,
    n,
    k,
    group_size,
    splits,
    HAS_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks of m, blocks of n, splits): result [m, n] by way of float32 [splits, m, n]."""
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    blocks = tl.cdiv(k, BLOCK_K)
    # The same partition as panguq.kernels.ascend.own.tiles.split_bounds.
    total = _sum_over_k(
        x_ptr,
        weight_ptr,
        scale_ptr,
        offset_ptr,
        rows,
        m,
        n,
        k,
        group_size,
        split * blocks // splits,
        (split + 1) * blocks // splits,
        HAS_OFFSET,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    tl.store(
        partials_ptr + split * m * n + rows[:, None] * n + columns[None, :],
        total,
        mask=(rows[:, None] < m) & (columns[None, :] < n),
    )
    if arrives_last(partials_ptr, flags_ptr, m, n, split, splits, FLAGS, BLOCK_M, BLOCK_N):
        for part in range(0, BLOCK_M, ROWS):
            some = first_row + part + tl.arange(0, ROWS)
            places = some[:, None] * n + columns[None, :]
            inside = (some[:, None] < m) & (columns[None, :] < n)
            summed = add_partials(partials_ptr, places, inside, m, n, splits)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + columns, mask=columns < n, other=0.0)
                summed += bias.to(tl.float32)[None, :]
            tl.store(result_ptr + places, summed.to(result_ptr.dtype.element_ty), mask=inside)
        lower_flags(flags_ptr, splits, FLAGS)
