"""Keeping the C library from holding on to memory that a compile has freed.

By default glibc learns from large blocks that are freed to serve such blocks from its heap, where
they leave holes: the float64 proof of a 135M model then costs a gigabyte instead of 200 MiB.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
LARGE_BLOCK_BYTES = 4 << 20
KEPT_BYTES = 64 << 20


def return_large_blocks() -> None:
    """From now on, blocks of 4 MiB and more go back to the system as soon as they are freed.

    Smaller ones, such as most activations, are still reused: up to 64 MiB of them stay with the
    process, while glibc would return them, too, from 128 KiB on as soon as the last is freed, and
    the system then zeroes pages for every slice of a weight. Does nothing without glibc.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def new_garbage_alone() -> Iterator[None]:
    """Within, Python looks for garbage among what was made within.

    Most objects of a process are classes and functions of torch and transformers, and a look at all
    takes a quarter of a second. Does nothing where somebody has frozen objects before, as
    servers do in front of a fork: they would be thawed.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release_free_memory() -> None:
    """Return what is not in use any more: graphs are cyclic, so Python must look for them."""
    gc.collect()
    return_free_pages()


def return_free_pages() -> None:
    """Return the pages of free blocks, wherever in the heap; does nothing without glibc."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
