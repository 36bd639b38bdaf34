"""How large a file may be that is read whole, and how many things it may count.

A file that asks for more is refused before it is read: a few kilobytes, or a sparse file that takes
no room on its disk, could otherwise ask for all memory, or for hours. Every bound leaves room for
a model of 200 layers and 100,000 tensors, several times over; the largest published are named.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from panguq.errors import StorageError

MIB = 1 << 20

CONFIG_BYTES = 16 * MIB
"""config.json, generation_config.json. DeepSeek-V3's has 2 KB; a list of modules that are not
quantized takes a few MB."""
INDEX_BYTES = 128 * MIB
"""An index of shards, or quant_model_description.json. DeepSeek-V3's 91,991 tensors take 9 MB."""
TOKENIZER_BYTES = 256 * MIB
"""Each file of a tokenizer. Gemma's tokenizer.json has 33 MB."""
TARGET_BYTES = 1 * MIB
"""A target file in JSON; recipes and target files in YAML have a bound of their own
(`plain_yaml.MAX_BYTES`)."""
TABLE_BYTES = 16 * MIB
"""A table of ops' times. Huawei's largest published one has some hundred KB."""
MANIFEST_BYTES = 16 * MIB
"""manifest.json of a saved model; a file of weights takes 120 bytes of it."""
OWN_BYTES = 512 * MIB
"""Any other file that panguq reads whole out of its own folders: graphs, reports, dumps."""
HEADER_BYTES = 64 * MIB
"""The header of a safetensors file; a tensor takes about 150 bytes of it."""

TENSORS_IN_FILE = 200_000
TENSORS = 1_000_000
"""Of a whole folder. Three a weight are stored in quantized ones."""

LAYERS = 1024
"""Of a model. Llama-3.1-405B has 126."""
EXPERTS = 8192
"""Of a layer. Kimi-K2 has 384."""
EXPERTS_IN_ALL = 1 << 18
"""Layers times experts: modules that some classes make one by one."""
VOCABULARY = 1 << 24
"""Gemma has 262,144 tokens."""
POSITIONS = 1 << 31
"""Positions, windows, chunks. Llama 4 Scout says 10,485,760."""
WIDTH = 1 << 20
"""Any other whole number of a configuration: sizes, heads, ranks. Llama-3.1-405B's largest is
53,248."""


def read_limited(path: Path, largest: int, hint: str = "") -> bytes:
    """The bytes of a regular file, or of what a link to one leads to.

    Raises StorageError for one of more than `largest` bytes, or for none, and OSError.
    """
    with open_file(path, hint) as file:
        refuse_larger(path, os.fstat(file.fileno()).st_size, largest, hint)
        return file.read(largest)


def open_file(path: Path, hint: str = "") -> BinaryIO:
    """A regular file, or what a link to one leads to. Raises StorageError for none, and OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StorageError(f"{path}: not a regular file", hint)
    return os.fdopen(handle, "rb")


def refuse_larger(path: Path, size: int, largest: int, hint: str = "") -> None:
    """Raises StorageError if a file has more bytes than its kind ever has."""
    if size > largest:
        raise StorageError(
            f"{path}: {size / MIB:.0f} MiB, the largest such file read has {largest // MIB} MiB",
            hint,
        )
