"""What planning and exporting ask of NPU ops without importing torch. Chips are in `chips.py`."""

from __future__ import annotations

# The int8 x int4 matmul (aclnnQuantMatmulV5, groups): inputs for each weight scale.
W4A8_GROUP = 256

# 4-bit codes in an int32 word, as the NPU's ops read and write them.
CODES_PER_WORD = 8
KRONECKER_LARGEST = 256  # rows of either factor that npu_kronecker_quant takes
