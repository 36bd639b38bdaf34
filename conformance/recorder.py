"""What the stand-in libopapi.so has recorded; see stand_ins/recorder.cpp."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def _library() -> ctypes.CDLL:
    # torch_npu opens the library by this name too, so this is the same copy.
    library = ctypes.CDLL("libopapi.so")
    library.take_record.restype = ctypes.c_char_p
    return library


def take_record() -> str:
    """The aclnn calls since the last time, one a line."""
    record: bytes = _library().take_record()
    return record.decode()
