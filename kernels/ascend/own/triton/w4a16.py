"""W4A16 matmul: vector cores make 16-bit integers of codes, the cube multiplies, sums are scaled.

Launched by `launch.py`. x float16 or bfloat16 [m, k], rows contiguous; weight int16 [k, n / 4] as
`int4_quarters` packs; scale and offset [groups, n] in x's dtype, contiguous; bias [n].
`group_size` is a multiple of BLOCK_K, or at least k for one scale per output. A program computes
BLOCK_N / 4 outputs of each quarter of n.

A code becomes code * 4096: its nibble alone, at the top of an int16, cast. Sums are divided again.
(Writing a bfloat16's bits in place of a cast takes fewer instructions, but the compiler then has
both vector cores of a pair do all of them.)
"""

# mypy: ignore-errors
# A kernel is Triton's language, which only looks like Python.

import triton
import triton.language as tl

from panguq.kernels.ascend.own.triton.split_k import add_partials, arrives_last, lower_flags


@triton.jit
def _numbers(words, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Of every word the nibble that SHIFT brings to the top, as a number: code * 4096."""
    top = words << SHIFT if SHIFT else words
    alone = top if SHIFT == 12 else top & -4096
    # No instruction makes a bfloat16 of an int16.
    return alone.to(tl.float16) if dtype == tl.float16 else alone.to(tl.float32).to(dtype)


@triton.jit
def _scaled(sums, tokens, scale_ptr, offset_ptr, columns, inside, HAS_OFFSET: tl.constexpr):
    """float32: (sums of 4096 * x * code + offset * tokens) * scale; tokens are sums of 4096 * x."""
    if HAS_OFFSET:
        offset = tl.load(offset_ptr + columns, mask=inside, other=0.0)
        sums += tokens[:, None] * offset.to(tl.float32)[None, :]
    scale = tl.load(scale_ptr + columns, mask=inside, other=0.0)
    return sums * scale.to(tl.float32)[None, :]


@triton.jit
def _sum_over_k(
    x_ptr,
    weight_ptr,
    scale_ptr,
    offset_ptr,
    rows,
    columns,
    m,
    n,
    k,
    group_size,
    first_block,
    last_block,
    HAS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QUARTER: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Four float32 [BLOCK_M, QUARTER]: of blocks first_block .. last_block - 1 of k, the sums of
    `columns` of each quarter of n."""
    quarter = n // 4
    inside = columns < quarter
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total0 = tl.zeros((BLOCK_M, QUARTER), dtype=tl.float32)
    total1 = tl.zeros((BLOCK_M, QUARTER), dtype=tl.float32)
    total2 = tl.zeros((BLOCK_M, QUARTER), dtype=tl.float32)
    total3 = tl.zeros((BLOCK_M, QUARTER), dtype=tl.float32)
    for block in range(first_block, last_block):
        inputs = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * k + inputs[None, :],
            mask=(rows[:, None] < m) & (inputs[None, :] < k),
            other=0.0,
        )
        words = tl.load(
            weight_ptr + inputs[:, None] * quarter + columns[None, :],
            mask=(inputs[:, None] < k) & inside[None, :],
            other=0,
        )
        # A block of k lies in one group, so one row of scales serves all of it.
        group = block * BLOCK_K // group_size
        scales, offsets = scale_ptr + group * n, offset_ptr
        if HAS_OFFSET:
            offsets = offset_ptr + group * n
        sums0 = tl.dot(x, _numbers(words, 12, dtype))
        sums1 = tl.dot(x, _numbers(words, 8, dtype))
        sums2 = tl.dot(x, _numbers(words, 4, dtype))
        sums3 = tl.dot(x, _numbers(words, 0, dtype))
        tokens = tl.sum(x.to(tl.float32), 1) * 4096.0
        total0 += _scaled(sums0, tokens, scales, offsets, columns, inside, HAS_OFFSET)
        at1, at2, at3 = columns + quarter, columns + 2 * quarter, columns + 3 * quarter
        total1 += _scaled(sums1, tokens, scales, offsets, at1, inside, HAS_OFFSET)
        total2 += _scaled(sums2, tokens, scales, offsets, at2, inside, HAS_OFFSET)
        total3 += _scaled(sums3, tokens, scales, offsets, at3, inside, HAS_OFFSET)
    return total0 / 4096.0, total1 / 4096.0, total2 / 4096.0, total3 / 4096.0


@triton.jit
def _store(total, bias_ptr, result_ptr, rows, columns, inside, m, n, HAS_BIAS: tl.constexpr):
    """Sums, and bias, at these rows and columns of the result."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        total += bias.to(tl.float32)[None, :]
    tl.store(
        result_ptr + rows[:, None] * n + columns[None, :],
        total.to(result_ptr.dtype.element_ty),
        mask=(rows[:, None] < m) & inside[None, :],
    )


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
    QUARTER: tl.constexpr = BLOCK_N // 4
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * QUARTER + tl.arange(0, QUARTER)
    quarter = n // 4
    inside = columns < quarter
    total0, total1, total2, total3 = _sum_over_k(
        x_ptr,
        weight_ptr,
        scale_ptr,
        offset_ptr,
        rows,
        columns,
        m,
        n,
        k,
        group_size,
        0,
        tl.cdiv(k, BLOCK_K),
        HAS_OFFSET,
        BLOCK_M,
        QUARTER,
        BLOCK_K,
    )
    at1, at2, at3 = columns + quarter, columns + 2 * quarter, columns + 3 * quarter
    _store(total0, bias_ptr, result_ptr, rows, columns, inside, m, n, HAS_BIAS)
    _store(total1, bias_ptr, result_ptr, rows, at1, inside, m, n, HAS_BIAS)
    _store(total2, bias_ptr, result_ptr, rows, at2, inside, m, n, HAS_BIAS)
    _store(total3, bias_ptr, result_ptr, rows, at3, inside, m, n, HAS_BIAS)


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
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks of m, blocks of n, splits): result [m, n] by way of float32 [splits, m, n]."""
    QUARTER: tl.constexpr = BLOCK_N // 4
    first_row = tl.program_id(0) * BLOCK_M
    first_column = tl.program_id(1) * QUARTER
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, QUARTER)
    quarter = n // 4
    inside = columns < quarter
    split = tl.program_id(2)
    blocks = tl.cdiv(k, BLOCK_K)
    # The same partition as panguq.kernels.ascend.own.tiles.split_bounds.
    total0, total1, total2, total3 = _sum_over_k(
        x_ptr,
        weight_ptr,
        scale_ptr,
        offset_ptr,
        rows,
        columns,
        m,
        n,
        k,
        group_size,
        split * blocks // splits,
        (split + 1) * blocks // splits,
        HAS_OFFSET,
        BLOCK_M,
        QUARTER,
        BLOCK_K,
    )
    own = partials_ptr + split * m * n + rows[:, None] * n + columns[None, :]
    within = (rows[:, None] < m) & inside[None, :]
    # The first quarter is stored last: `arrives_last` reads of it.
    tl.store(own + 3 * quarter, total3, mask=within)
    tl.store(own + 2 * quarter, total2, mask=within)
    tl.store(own + quarter, total1, mask=within)
    tl.store(own, total0, mask=within)
    if arrives_last(
        partials_ptr, flags_ptr, first_column, quarter, m, n, split, splits, FLAGS, COUNTED, BLOCK_M
    ):
        for part in range(0, BLOCK_M, ROWS):
            some = first_row + part + tl.arange(0, ROWS)
            for number in range(4):
                at = columns + number * quarter
                places = some[:, None] * n + at[None, :]
                mask = (some[:, None] < m) & inside[None, :]
                summed = add_partials(partials_ptr, places, mask, m, n, splits)
                _store(summed, bias_ptr, result_ptr, some, at, inside, m, n, HAS_BIAS)
        lower_flags(flags_ptr, splits, FLAGS)
