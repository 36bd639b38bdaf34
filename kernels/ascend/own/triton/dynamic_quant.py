"""Per-token dynamic quantization: a first walk over k finds the largest value, a second the codes.

Two walks, because a token need not fit a vector core's memory. One token at a time, because the
compiler turns a two-dimensional float32 into int8 only in blocks of 32 rows.
"""

# mypy: ignore-errors
# A kernel is Triton's language, which only looks like Python.

import triton
import triton.language as tl

SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def dynamic_quant(x_ptr, codes_ptr, scale_ptr, m, k, BLOCK_K: tl.constexpr):
    """Any grid: x float [m, k] -> codes int8 [m, k], scale float32 [m], all contiguous."""
    blocks = tl.cdiv(k, BLOCK_K)
    for row in range(tl.program_id(0), m, tl.num_programs(0)):
        largest = 0.0
        for block in range(blocks):
            inputs = block * BLOCK_K + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + row * k + inputs, mask=inputs < k, other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), axis=0))
        scale = largest / 127.0
        tl.store(scale_ptr + row, scale)
        # Dividing by infinity gives code 0.
        divisor = tl.where(scale >= SMALLEST_NORMAL, scale, float("inf"))
        for block in range(blocks):
            inputs = block * BLOCK_K + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + row * k + inputs, mask=inputs < k, other=0.0)
            code = x.to(tl.float32) / divisor
            # 1.5 * 2**23: adding it leaves no fraction bits, so float32 addition rounds to the
            # nearest integer, ties to even.
            code = (code + 12582912.0) - 12582912.0
            tl.store(codes_ptr + row * k + inputs, code.to(tl.int8), mask=inputs < k)
