"""How far a result may be from the exact one if it was rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

# Half of the distance to the next number, at most, relative to the number.
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


def half_unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of rounding a float64 value to this dtype, also below its normal range."""
    return exact.abs().clamp(min=torch.finfo(dtype).smallest_normal) * EPSILON[dtype]
