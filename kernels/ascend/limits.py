"""Limits of the NPU that planning and exporting ask for without importing torch."""

from __future__ import annotations

# k and n of a quantized matmul (op-plugin's pages on npu_quant_matmul and
# npu_weight_quant_batchmatmul).
LARGEST_DIMENSION = 65535
