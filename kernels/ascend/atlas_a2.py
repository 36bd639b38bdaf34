"""Atlas A2: Ascend 910B1 to 910B4. Each number says where it is from.

Sizes of memories and fractals: CANN 8.1 platform_config of Ascend910B1 to B4.
"""

from __future__ import annotations

from panguq.kernels.ascend.chip import Chip, Number, Tile

KIB = 1024

# For few tokens, for which 4-bit weights are: wide in n, since there the weight is what is read.
# block_k 32, 64 and 128 divide the group sizes in use; a group in one block is scaled once.
# 64 x 128 x 64 would fit by the rule, but with Split-K it compiles without double buffering.
_W4A16_TILES: tuple[Tile, ...] = (
    (16, 128, 64),
    (16, 128, 128),
    (16, 256, 32),
    (16, 256, 64),
    (16, 256, 128),
    (32, 128, 64),
    (32, 128, 128),
    (32, 256, 32),
)
_W8A8_TILES: tuple[Tile, ...] = (
    (16, 64, 512),
    (16, 128, 512),
    (16, 256, 256),
    (16, 256, 512),
    (32, 256, 512),
    (64, 128, 512),
    (64, 256, 512),
    (128, 128, 512),
    (128, 256, 256),
    (128, 256, 512),
    (256, 128, 512),
)
# Fitted constants are written by hand from the output of `python -m bench.cost_model`, which fits
# them anew at every run and compares; docs/cost-model.md has its figures.
_SPLIT_K_TIMINGS = (
    "fitted to the 8 published timings of CATLASS examples 12 and 52 (W8A8, 910B3, CANN 8.5.0)"
)
_CANN_BENCH = "fitted to {} of cann-bench's times of {} on 910B2 (hicann/cann-bench d59d44ca)"
_W8A8 = _CANN_BENCH.format(9, "W8A8 matmuls")
_W8A16 = _CANN_BENCH.format(9, "W8A16 matmuls")
_FLOATS = "fitted to 12 published times of float16 and bfloat16 matmuls on 910B2"
_COMMON: dict[str, Number] = {
    "l2_read_bytes_per_cycle": (110, "CANN 8.1 platform_config, l2_read_rate"),
    "l2_write_bytes_per_cycle": (86, "CANN 8.1 platform_config, l2_write_rate"),
    "vector_bytes_per_cycle": (64, "CANN 8.1 platform_config, ub_to_l2_rate"),
    "vector_lanes": (128, "CANN 8.1 platform_config, vec_calc_size"),
    "dequantize_instructions": (
        10,
        "counted in an earlier W4A16 kernel of panguq: 3 shifts, interleave, 2 casts, multiply in "
        "float32; for kernels that dequantize whole weights",
    ),
    "arrival_cycles": (
        3143,
        "CANN's cycle model (ge, att perf_param_v1): heads of 3 loads (own sum, flags, first "
        "partial sums), 882 each, and of a store, 497",
    ),
    "memory_unit_bytes": (
        512,
        "CATLASS matmul optimization guide: rows of a multiple of 512 B move fastest; a 640 B row "
        "took as long as a 1024 B one",
    ),
    "float32_macs_per_cycle": (
        1024,
        "assumed a quarter of float16's 4096; platform_config has no float32 entry",
    ),
    "vector_start_us": (1, "CATLASS example 102, cost of a kernel that also uses vector cores"),
    "vector_start_per_wave_us": (
        7,
        "CATLASS example 102, cost of a kernel that also uses vector cores: 7 us x blocks / cores",
    ),
    "launch_us": (13.25, _SPLIT_K_TIMINGS),
    "core_load_bytes_per_cycle": (93.9, _SPLIT_K_TIMINGS),
    "vendor_dequantize_bytes_per_cycle": (
        2.76,
        "fitted to 2 published W4A16 timings (group 32, m = 1, 910B1, CANN 9.0.0-beta.2, "
        "GPTQModel's Ascend notes)",
    ),
    "float_start_us": (12.2, _FLOATS),
    "float_exposed": (0.7, _FLOATS),
    "int8_start_us": (6.5, _W8A8),
    "int8_load_start_us": (0.43, _W8A8),
    "int8_exposed": (1.0, _W8A8),
    "int8_load_bytes_per_cycle": (
        60,
        "128 x 256 8-bit blocks move at 54 (CATLASS example 12) to 61 (cann-bench, all cores busy)",
    ),
    "epilogue_cycles": (0.227, _W8A8),
    "unaligned_cube": (
        4.2,
        "taken from a grouped matmul of 1023 inputs and 2047 outputs (cann-bench d59d44ca, 910B2)",
    ),
    "w8a16_start_us": (12.2, _W8A16),
    "w8a16_load_start_us": (2.65, _W8A16),
    "w8a16_dequantize_bytes_per_cycle": (10.5, _W8A16),
    "w8a16_bfloat16_times": (1, "assumed: no timing bears on it"),
    "w8a16_sum_cycles": (2.43, _W8A16),
}


def _part(part: str, cores: int, clock_mhz: int, l2_mib: int, hbm: int) -> dict[str, Number]:
    file = f"CANN 8.1 platform_config, {part}.ini"
    hbm_source = (
        "comment in CANN's matmul_v3_base_tiling: 1.6 TB/s"
        if hbm == 1600
        else "third-party notes on 910B4; half of 910B1's 1.6 TB/s, as its memory is half"
    )
    return {
        "cube_cores": (cores, file),
        "vector_cores": (2 * cores, file),
        "clock_mhz": (clock_mhz, file),
        "l2_mib": (l2_mib, file),
        "hbm_gb_per_s": (hbm, hbm_source),
        "float_memory_gb_per_s": _memory(1530, hbm, _FLOATS),
        "int8_memory_gb_per_s": _memory(882, hbm, _W8A8),
        "w8a16_memory_gb_per_s": _memory(1650, hbm, _W8A16),
    }


def _memory(rate: float, hbm: int, source: str) -> Number:
    return rate * hbm / 1600, source if hbm == 1600 else f"{source}, in proportion to memory"


ATLAS_A2 = Chip(
    name="Atlas A2",
    kind="ascend",
    memory={"ub": 192 * KIB, "l1": 512 * KIB, "l0a": 64 * KIB, "l0b": 64 * KIB, "l0c": 128 * KIB},
    fractal=16,
    fractal_k={2.0: 16, 1.0: 32, 0.5: 64},  # platform_config, DtypeMKN
    block_bytes=32,
    # op-plugin's pages on npu_quant_matmul and npu_weight_quant_batchmatmul
    largest_dimension=65535,
    w4a8_smallest_refused_k=29576,  # aclnnQuantMatmulV5, groups
    # Blocks of which the sums fit L0C and two steps of k fit L0A, L0B and L1: what CATLASS and
    # CANN's tuned tilings use.
    vendor_blocks=((128, 256), (256, 128), (64, 512)),
    tiles={
        "w4a16_data_parallel": _W4A16_TILES,
        "w4a16_split_k": _W4A16_TILES,
        "w8a8_data_parallel": _W8A8_TILES,
        "w8a8_split_k": _W8A8_TILES,
        "dynamic_quant": ((1, 1, 4096), (1, 1, 8192)),
    },
    constants=_COMMON,
    parts={
        "ascend910b1": _part("Ascend910B1", 24, 1850, 192, 1600),
        "ascend910b2": _part("Ascend910B2", 24, 1800, 192, 1600),
        "ascend910b3": _part("Ascend910B3", 20, 1800, 192, 1600),
        "ascend910b4": _part("Ascend910B4", 20, 1500, 96, 800),
    },
)
