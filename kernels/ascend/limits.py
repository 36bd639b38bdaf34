"""Limits of the NPU that planning and exporting ask for without importing torch."""

from __future__ import annotations

# k and n of a quantized matmul (op-plugin's pages on npu_quant_matmul and
# npu_weight_quant_batchmatmul).
LARGEST_DIMENSION = 65535

# The int8 x int4 matmul (aclnnQuantMatmulV5, groups): inputs for each weight scale, and the first k
# that it refuses.
W4A8_GROUP = 256
W4A8_SMALLEST_REFUSED_K = 29576
