"""What can hold of a graph."""

from __future__ import annotations

import enum


class Property(enum.Enum):
    """Something that holds of a graph. Each has exactly one check, in `ir/verify.py`."""

    CANONICAL = "canonical ops only, every node labelled"
    FLOAT_MATMULS = "every matmul reads floating-point weights: nothing is quantized yet"
    FLOAT_CACHE = "the cache of keys and values is in floating point"
    SCHEMES = "every matmul with a weight has a scheme"
    STATISTICS = "every matmul to be quantized knows its input's statistics"
    CALIBRATED = "every statically quantized input has an observed range"
    QDQ = "quantized values pass through quantize and dequantize nodes"
    UNSOLVED = "no code of a weight is chosen yet: the graph computes them from float weights"
    WEIGHT_CODES = "quantized weights are stored as integer codes"
    LOWERED = "no quantize/dequantize pair is left in front of a matmul"
    ASCEND_OPS = "only aten and npu ops and panguq's own NPU kernels are called"


TRACED = frozenset({Property.FLOAT_MATMULS, Property.FLOAT_CACHE})
"""What holds of every trace."""
