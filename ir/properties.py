"""What can hold of a graph."""

from __future__ import annotations

import enum


class Property(enum.Enum):
    """Something that holds of a graph. Each has exactly one check, in `ir/verify.py`."""

    CANONICAL = "canonical ops only, every node labelled"
    SCHEMES = "every matmul with a weight has a scheme"
    STATISTICS = "every matmul to be quantized knows its input's statistics"
    CALIBRATED = "every statically quantized input has an observed range"
    QDQ = "quantized values pass through quantize and dequantize nodes"
    WEIGHT_CODES = "quantized weights are stored as integer codes"
    LOWERED = "no quantize/dequantize pair is left in front of a matmul"
    ASCEND_OPS = "only aten and npu ops and panguq's own NPU kernels are called"
