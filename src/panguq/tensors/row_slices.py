"""Large tensors a few rows at a time.

What is computed of such a slice stays in a core's cache, and is small enough for the allocator to
give the same memory out again and again (see `memory.py`): copies of a whole weight are mapped anew
each time, and the system's zeroing of their pages then costs more than the arithmetic. What a loop
over slices keeps goes into a tensor made before it: small results kept between the copies would
leave the heap in holes that are too small for the next copy, and a compile grew by gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from panguq.tensors.nameless import roomy_empty

ELEMENTS_AT_ONCE = 1 << 18  # 1 MiB in float32, 2 MiB in float64


def row_slices(tensor: Tensor, multiple: int = 1) -> Iterator[slice]:
    """Slices of the first axis of at most `ELEMENTS_AT_ONCE` elements, in order.

    Each but the last has a multiple of `multiple` rows, and at least that many. A tensor without
    rows has one slice, an empty one.
    """
    per_row = max(tensor.numel() // max(len(tensor), 1), 1)
    rows = max(ELEMENTS_AT_ONCE // (per_row * multiple), 1) * multiple
    for start in range(0, max(len(tensor), 1), rows):
        yield slice(start, min(start + rows, len(tensor)))


def each_matrix(compute: Callable[..., Tensor], result: Tensor, *stacked: Tensor | None) -> Tensor:
    """A tensor like `result` `[experts, ...]` of what `compute` gives for each expert's `stacked`.

    One after the other, since copies of all experts' weights at once may be as large as a model;
    the whole may lie in a file (`roomy_empty`), and `result`'s own memory is not touched.
    """
    if result.device.type == "cpu":
        result = roomy_empty(result.shape, result.dtype)
    for index in range(len(result)):
        result[index] = compute(*(None if part is None else part[index] for part in stacked))
    return result
