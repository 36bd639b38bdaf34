"""The chips that panguq knows, by the kind that target files call them."""

from __future__ import annotations

from panguq.kernels.ascend.ascend950 import ASCEND_950
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.chip import Chip

CHIPS: dict[str, Chip] = {chip.kind: chip for chip in (ATLAS_A2, ASCEND_950)}
