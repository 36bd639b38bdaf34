"""Finished parts of a compile in a folder, so that a killed one can go on where it stopped.

    PANGUQ_WORK                           says that the folder is panguq's (`claimed_folder.py`)
    compile.json                          what is compiled, how, and from which data
    checks.json                           checks of its graphs that were passed, and what they found
    units/<pass>/<unit>/facts.json        a finished unit: written last, so whole if it is there
    units/<pass>/<unit>/<n>.safetensors   its n-th large tensor
    units/<pass>/<unit>/small.safetensors its other tensors

A large tensor has a file of its own, in the very bytes in which a saved model would hold it alone,
so that saving need not write it again. A finished unit has been forced to disk, names and all, so
that it outlives the system, too. A unit whose bytes are not those of its checksums is named in a
warning and computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

from panguq.errors import StorageError
from panguq.files.claimed_folder import ClaimedFolder, delete, writing
from panguq.files.partial_folder import sync
from panguq.files.whole_file import whole_file, write_file
from panguq.tensors.safetensors_files import ALONE_BYTES, read_alone, read_mapped, write_tensors

KEY = "compile.json"
CHECKS = "checks.json"
FACTS = "facts.json"
SMALL = "small.safetensors"
UNITS = "units"
TEMPORARY = "temporary"
OWN = frozenset({KEY, CHECKS, UNITS, TEMPORARY})
LONGEST_NAME = 200  # bytes of a file's name; most systems take 255
_READ_BYTES = 8 << 20
logger = logging.getLogger("panguq")
Facts = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Finished:
    """What a unit of work yields: tensors by name, and plain numbers and words by name."""

    tensors: Mapping[str, Tensor]
    facts: Facts = field(default_factory=dict)


class WorkFolder:
    """The units of one compile under `path`, which one process at a time may use.

    Tensors below `in_memory_bytes` are read into memory. Raises StorageError for a folder that
    holds something else, that cannot be written or that another compile is using.
    """

    def __init__(self, path: Path, in_memory_bytes: int = 1 << 14) -> None:
        self.in_memory_bytes = in_memory_bytes
        self._claimed = ClaimedFolder(path, OWN)
        self.path = self._claimed.path
        self.temporary = self.path / TEMPORARY
        self.found = 0

    def open_for(self, key: Mapping[str, str]) -> tuple[str, ...]:
        """Keep what belongs to the compile that `key` describes; drop everything of another one.

        Returns the names of the entries that differ from the key of the parts that were dropped;
        of a damaged key, nothing can be told but that.
        """
        text = _signed(key)
        old = _read_key(self.path / KEY)
        if old is None:
            logger.warning("%s is damaged, so all parts are computed again", self.path / KEY)
        changed = tuple(sorted(k for k in {*key, *old} if key.get(k) != old.get(k))) if old else ()
        with writing(self.path):
            if not old or changed:
                # The key first: units without one are no one's, and are dropped the next time.
                (self.path / KEY).unlink(missing_ok=True)
                (self.path / CHECKS).unlink(missing_ok=True)
                shutil.rmtree(self.path / UNITS, ignore_errors=True)
                write_file(self.path / KEY, [text.encode()])
                sync(self.path)
            delete(self.temporary)
            self.temporary.mkdir()
        return changed

    @property
    def passed_checks(self) -> dict[str, float]:
        """What the passed checks found; nothing where that is damaged, so they are made again."""
        return _read_key(self.path / CHECKS) or {}

    def note_checks(self, passed: Mapping[str, float]) -> None:
        """Keep what checks have found, as long as the key stays the same."""
        with writing(self.path):
            (self.path / CHECKS).unlink(missing_ok=True)
            write_file(self.path / CHECKS, [_signed(passed).encode()])

    def find(self, unit: str) -> Finished | None:
        """A unit that was kept, its tensors mapped; None if it was not finished, or is damaged."""
        folder = self._folder(unit)
        if not (folder / FACTS).is_file():
            return None
        try:
            _check(folder)
            found = self._read(folder)
        except StorageError as error:
            logger.warning("%s; it is computed again", error.message)
            return None
        self.found += 1
        return found

    def keep(self, unit: str, done: Finished) -> Finished:
        """Write a finished unit; returns it with its tensors mapped.

        Raises StorageError when the disk is full, and keeps nothing of the unit then.
        """
        folder = self._folder(unit)
        large = [name for name, tensor in done.tensors.items() if tensor.nbytes >= ALONE_BYTES]
        small = {name: done.tensors[name] for name in done.tensors if name not in large}
        order = {"names": list(done.tensors), "large": large, "facts": dict(done.facts)}
        with writing(self.path):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
                files = {
                    f"{number}.safetensors": {name: done.tensors[name]}
                    for number, name in enumerate(large)
                } | {SMALL: small}
                digests = {name: write_tensors(folder / name, files[name]) for name in files}
                with whole_file(folder / FACTS) as partial:
                    write_file(partial, [_signed({**order, "files": digests}).encode()])
                for made in (folder, *folder.parents):
                    sync(made)
                    if made == self.path:
                        break
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return self._read(folder)

    def _read(self, folder: Path) -> Finished:
        """The unit in this folder; its files were checked, or have just been written."""
        try:
            order = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            found = {name: self._short(t) for name, t in read_mapped(folder / SMALL).items()}
            for number, name in enumerate(order["large"]):
                found[name] = read_alone(folder / f"{number}.safetensors", name)
            return Finished({name: found[name] for name in order["names"]}, order["facts"])
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _damaged(folder, str(error)) from error

    def _short(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.nbytes < self.in_memory_bytes else tensor

    @property
    def holds_units(self) -> bool:
        """Whether some unit is finished."""
        return any((self.path / UNITS).rglob(FACTS))

    def remove(self) -> None:
        """Delete the parts: the result is saved. Mapped tensors stay readable."""
        if self._claimed.is_held:
            with suppress(OSError):
                delete(self.path / KEY)  # first: units without one are no one's
        self._claimed.remove()

    def leave(self) -> None:
        """Let others use the folder. Where nothing was finished, nothing stays of it."""
        if not self.holds_units:
            self.remove()
        self.close()

    def close(self) -> None:
        """Let others use the folder."""
        self._claimed.release()

    def _folder(self, unit: str) -> Path:
        return self.path.joinpath(UNITS, *(_file_name(part) for part in unit.split("/")))


def _file_name(part: str) -> str:
    """A label as a file's name: one to one, and no way out of the folder."""
    name = quote(part, safe="")
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()
        name = f"{name[: LONGEST_NAME - len(digest) - 1]}~{digest}"
    return name.replace(".", "%2E", 1) if name.startswith(".") else name


def _signed(facts: Mapping[str, Any]) -> str:
    """`facts` as JSON with its own checksum as last entry; there is one spelling of each."""
    digest = hashlib.sha256(json.dumps(dict(facts)).encode()).hexdigest()
    return json.dumps({**facts, "sha256": digest})


def _check(folder: Path) -> None:
    """Compare a unit's files with their checksums. Raises StorageError."""
    try:
        text = (folder / FACTS).read_text(encoding="utf-8")
        facts = json.loads(text)
        del facts["sha256"]
        if _signed(facts) != text:
            raise _damaged(folder, f"{FACTS} was changed")
        for name, digest in facts["files"].items():
            if _sha256(folder / name) != digest:
                raise _damaged(folder, f"{name} was changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, str(error)) from error


def _damaged(folder: Path, why: str) -> StorageError:
    return StorageError(f"{folder}: a damaged part of a compile: {why}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read_key(path: Path) -> dict[str, Any] | None:
    """The key that was written; none of it where there is no file, None for a damaged one."""
    try:
        text = path.read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        del found["sha256"]
        return found if _signed(found) == text else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        return None
