"""Finished parts of a compile in a folder, so that a killed one can go on where it stopped.

    compile.json                          what is compiled, how, and from which data
    units/<pass>/<unit>/facts.json        a finished unit: written last, so whole if it is there
    units/<pass>/<unit>/<n>.safetensors   its n-th large tensor
    units/<pass>/<unit>/small.safetensors its other tensors

A large tensor has a file of its own, in the very bytes in which a saved model would hold it alone,
so that saving need not write it again. The files survive the death of the process, not of the
system: they are not forced to disk.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from torch import Tensor

from panguq.errors import StorageError
from panguq.weight_files import ALONE_BYTES, read_alone, read_mapped, write_tensors

KEY = "compile.json"
FACTS = "facts.json"
SMALL = "small.safetensors"
UNITS = "units"
TEMPORARY = "temporary"
OWN = {KEY, UNITS, TEMPORARY}
Facts = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Finished:
    """What a unit of work yields: tensors by name, and plain numbers and words by name."""

    tensors: Mapping[str, Tensor]
    facts: Facts = field(default_factory=dict)


class UnitFolder:
    """The units of one compile under `path`, which one process at a time may use.

    Tensors below `in_memory_bytes` are read into memory. Raises StorageError for a folder that
    holds something else, that cannot be written or that another compile is using.
    """

    def __init__(self, path: Path, in_memory_bytes: int = 1 << 14) -> None:
        self.path = path.resolve()
        self.in_memory_bytes = in_memory_bytes
        if self.path.exists() and not self.path.is_dir():
            raise StorageError(f"{self.path} is a file", "choose another folder to work in")
        if self.path.is_dir() and {p.name for p in self.path.iterdir()} - OWN:
            raise StorageError(
                f"{self.path} holds something else than a compile's parts",
                "choose another folder to work in, or an empty one",
            )
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._handle)
            raise StorageError(
                f"{self.path} is in use by another compile", "choose another folder to work in"
            ) from error
        except OSError:
            pass  # some network file systems cannot lock
        self.temporary = self.path / TEMPORARY
        self.found = 0

    def open_for(self, key: Mapping[str, str]) -> tuple[str, ...]:
        """Keep what belongs to the compile that `key` describes; drop everything of another one.

        Returns the names of the entries that differ from the key of the parts that were dropped.
        """
        text = json.dumps(dict(key), indent=1, sort_keys=True)
        old = _read_key(self.path / KEY)
        changed = tuple(sorted(k for k in {*key, *old} if key.get(k) != old.get(k))) if old else ()
        with _writing(self.path):
            if not old or changed:
                # The key first: units without one are no one's, and are dropped the next time.
                (self.path / KEY).unlink(missing_ok=True)
                shutil.rmtree(self.path / UNITS, ignore_errors=True)
                (self.path / KEY).write_text(text, encoding="utf-8")
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir()
        return changed

    def find(self, unit: str) -> Finished | None:
        """A unit that was kept, its tensors mapped; None if it was not finished."""
        folder = self._folder(unit)
        if not (folder / FACTS).is_file():
            return None
        self.found += 1
        return self._read(folder)

    def keep(self, unit: str, done: Finished) -> Finished:
        """Write a finished unit; returns it with its tensors mapped.

        Raises StorageError when the disk is full, and keeps nothing of the unit then.
        """
        folder = self._folder(unit)
        large = [name for name, tensor in done.tensors.items() if tensor.nbytes >= ALONE_BYTES]
        small = {name: done.tensors[name] for name in done.tensors if name not in large}
        order = {"names": list(done.tensors), "large": large, "facts": dict(done.facts)}
        with _writing(self.path):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
                for number, name in enumerate(large):
                    write_tensors(folder / f"{number}.safetensors", {name: done.tensors[name]})
                write_tensors(folder / SMALL, small)
                partial = folder / f"{FACTS}.partial"
                partial.write_text(json.dumps(order), encoding="utf-8")
                partial.rename(folder / FACTS)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return self._read(folder)

    def _read(self, folder: Path) -> Finished:
        try:
            order = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            found = {name: self._short(t) for name, t in read_mapped(folder / SMALL).items()}
            for number, name in enumerate(order["large"]):
                found[name] = read_alone(folder / f"{number}.safetensors", name)
            return Finished({name: found[name] for name in order["names"]}, order["facts"])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise StorageError(
                f"{folder}: a damaged part of a compile: {error}",
                "delete the folder of the compile's parts and compile again",
            ) from error

    def _short(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.nbytes < self.in_memory_bytes else tensor

    def remove(self) -> None:
        """Delete the folder: the compile is done. What is mapped stays readable."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let others use the folder."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _folder(self, unit: str) -> Path:
        return self.path.joinpath(UNITS, *(_file_name(part) for part in unit.split("/")))


def _file_name(part: str) -> str:
    """A label as a file's name: one to one, and no way out of the folder."""
    return quote(part, safe="").replace(".", "%2E", 1) if part.startswith(".") else quote(part, "")


def _read_key(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write the compile's parts: {error.strerror or error}",
            "free some space there, or choose another folder to work in",
        ) from error
