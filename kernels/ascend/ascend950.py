"""Ascend 950 (A5): the 950PR.

No platform file of it is at hand. What is not timed is derived from the lower bounds that
cann-bench states for its cases on a 950PR (432 TFLOP/s in 16 bits, 1.6 TB/s), or taken as on Atlas
A2. Beside integers it multiplies MX formats, which A2 does not; panguq has no kernel of them.
"""

from __future__ import annotations

from panguq.kernels.ascend.atlas_a2 import ATLAS_A2, KIB
from panguq.kernels.ascend.chip import Chip, Number

_BOUNDS = (
    "derived from cann-bench's lower bounds for 950PR (hicann/cann-bench d59d44ca): 432 TFLOP/s in "
    "16 bits are 32 cores of 8192 FLOP a cycle at 1650 MHz; the split into cores is assumed"
)
_AS_A2 = "taken as on Atlas A2: nothing is published of {} on 950PR"
_CANN_BENCH = "fitted to {} of cann-bench's times of {} on 950PR (hicann/cann-bench d59d44ca)"
_W8A8 = _CANN_BENCH.format(8, "W8A8 matmuls")
_W8A16 = _CANN_BENCH.format(10, "W8A16 matmuls")
_ASSUMED = "assumed as for its W8A8 matmuls: no float matmul is published of 950PR"


def _as_a2(name: str) -> Number:
    return ATLAS_A2.constants[name][0], _AS_A2.format(name)


ASCEND_950 = Chip(
    name="Ascend 950",
    kind="ascend950",
    memory={"ub": 192 * KIB, "l1": 512 * KIB, "l0a": 64 * KIB, "l0b": 64 * KIB, "l0c": 128 * KIB},
    fractal=16,
    fractal_k={2.0: 16, 1.0: 32},
    block_bytes=32,
    largest_dimension=ATLAS_A2.largest_dimension,
    w4a8_smallest_refused_k=1,
    vendor_blocks=ATLAS_A2.vendor_blocks,
    # None of panguq's own kernels was compiled for it.
    tiles=dict.fromkeys(ATLAS_A2.tiles, ()),
    constants={
        **{name: _as_a2(name) for name in ATLAS_A2.constants},
        "launch_us": (2.4, _ASSUMED),
        "float_memory_gb_per_s": (1600, _BOUNDS),
        "float_start_us": (2.4, _ASSUMED),
        "float_exposed": (0.65, _ASSUMED),
        "int8_memory_gb_per_s": (1600, _BOUNDS),
        "int8_start_us": (1.8, _W8A8),
        "int8_load_start_us": (0.7, _W8A8),
        "int8_load_bytes_per_cycle": (110, "assumed: its L2 rate; no time of 950PR is bound by it"),
        "int8_exposed": (0.68, _W8A8),
        "epilogue_cycles": (0.028, _W8A8),
        "unaligned_cube": (4.6, _W8A8),
        "w8a16_start_us": (2.4, "taken as for its W8A8 matmuls, whose smallest is timed"),
        "w8a16_load_start_us": (0.92, _W8A16),
        "w8a16_memory_gb_per_s": (1600, _BOUNDS),
        "w8a16_dequantize_bytes_per_cycle": (15.1, _W8A16),
        "w8a16_bfloat16_times": (1.15, _W8A16),
        "w8a16_sum_cycles": (1, "not used: this chip's kernel does not split inputs"),
    },
    parts={
        "ascend950pr": {
            "cube_cores": (32, _BOUNDS),
            "vector_cores": (64, _BOUNDS + "; two vector cores a cube core, as on Atlas A2"),
            "clock_mhz": (1650, _BOUNDS),
            "l2_mib": (128, "assumed: the times of cann-bench rise beyond about 128 MiB"),
            "hbm_gb_per_s": (1600, _BOUNDS),
        },
    },
    splits_inputs=False,
    lists_operators=False,
    foreign_formats=("MXFP8", "MXFP4", "HiF8", "FP8"),
    int4_refusal="no kernel of 4-bit integers is known on Ascend 950, whose 4-bit format is MXFP4",
)
