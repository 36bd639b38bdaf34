"""The end of a Split-K program: who arrives last adds its tile's partial sums, in a fixed order.

Every program stores its partial sums, then a flag, then reads the flags of its tile. Who finds all
raised adds the sums 0 .. splits - 1, so that float32 results are the same bits in every run. Two
programs may find that at once; both then write the same bits. Nobody waits, so that programs may
run in any order and on any number of cores. Flags are zeros before and after a launch.

Why flags, and not a count that `tl.atomic_add` increments: AscendNPU IR 1.2.0 compiles that, but
both vector cores of a core pair then add, and nothing makes them wait until the cube core has
stored the sums; where the old count is read, that is a load of its own, between locks that all
programs take. What it makes of the flags is checked for each tile (conformance/triton).

A GPU is the other way round: its plain loads and stores have no order that other programs would
see, and its atomics have. There a launch asks for COUNTED, and the first word of a tile's flags is
a count. An NPU's launch never does, and what it compiles is the same as without.
"""

# mypy: ignore-errors
# A kernel is Triton's language, which only looks like Python.

import triton
import triton.language as tl


@triton.jit
def arrives_last(
    partials_ptr,
    flags_ptr,
    first_column,
    columns,
    m,
    n,
    split,
    splits,
    FLAGS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr = 8,
):
    """Whether all partial sums of this program's tile are stored, its own included.

    flags int32 [tiles, splits, LANES], FLAGS at least splits * LANES. A flag is 32 bytes wide, the
    least that moves at a time. The tile begins at `first_column` of so many `columns`.
    """
    if COUNTED:
        tile = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * splits
        # All threads have stored before one counts, and all load after it has.
        tl.debug_barrier()
        before = tl.atomic_add(flags_ptr + tile * LANES, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        last = before == splits - 1
    else:
        lanes = tl.arange(0, LANES)
        places = first_column + lanes
        place = (split * m + tl.program_id(0) * BLOCK_M) * n
        # The flag is made of a sum that was just stored, so that it cannot overtake the sums: the
        # compiler lets vector cores wait for the cube core where they read what it stored.
        stored = tl.load(partials_ptr + place + places, mask=places < columns, other=0)
        one = (stored.to(tl.int32, bitcast=True) | 1) & 1
        tile = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * splits
        tl.store(flags_ptr + (tile + split) * LANES + lanes, one)
        flags = tl.arange(0, FLAGS)
        arrived = tl.load(flags_ptr + tile * LANES + flags, mask=flags < splits * LANES, other=1)
        last = tl.min(arrived, 0) > 0
    return last


@triton.jit
def lower_flags(flags_ptr, splits, FLAGS: tl.constexpr, LANES: tl.constexpr = 8):
    """Zeros for the flags of this program's tile, as the next launch wants them."""
    tile = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * splits
    flags = tl.arange(0, FLAGS)
    zeros = tl.zeros((FLAGS,), dtype=tl.int32)
    tl.store(flags_ptr + tile * LANES + flags, zeros, mask=flags < splits * LANES)


@triton.jit
def add_partials(partials_ptr, places, inside, m, n, splits):
    """The sums 0 .. splits - 1 at `places` of [m, n], added in this order."""
    total = tl.load(partials_ptr + places, mask=inside, other=0)
    for split in range(1, splits):
        total += tl.load(partials_ptr + split * m * n + places, mask=inside, other=0)
    return total
