"""The map's folder: finished cells, their items and logs, and what is still being made.

    map.json              the model, which all cells have in common
    cells/NAME.json       a finished cell, whole or not there
    items/NAME.json       its items: what was asked, said, right
    logs/NAME.log         what its process said meanwhile
    compiled/KEY/         a compiled model, until the last cell of its recipe is done
    compiled/KEY.json     why there is none: the recipe was refused
    locks/, attempts/     who works on what, and how often it was begun
    cells.jsonl           a line a cell
    index.html            the page

Whoever makes a cell holds its lock, which dies with the process. So several processes fill one map,
and a killed one is continued.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from panguq.accuracy_map.job import Job
from panguq.errors import StorageError
from panguq.files.whole_file import whole_file

FORMAT = 1
FOLDERS = ("cells", "items", "logs", "compiled", "locks", "attempts")
FIELDS = (
    "model", "recipe", "task", "protocol", "seed", "limit", "value", "stderr", "float_value",
    "difference", "low", "high", "p", "right_to_wrong", "wrong_to_right", "kl", "top1", "items",
    "seconds", "peak_mib", "bits_per_weight", "status", "reason",
)  # fmt: skip
"""Of a line of cells.jsonl, in order."""
ATTEMPTS = 3
Cell = dict[str, Any]


class MapFolder:
    """A map on disk. Raises StorageError for what is no map, and for a disk that is full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def existing(cls, path: Path) -> MapFolder:
        """A map that is there."""
        if not (path / "map.json").is_file():
            raise StorageError(f"{path}: no map is there (map.json is missing)", "give its folder")
        return cls(path)

    @classmethod
    def of_model(cls, path: Path, model: str, sha256: str) -> MapFolder:
        """The map of this model in `path`, new or continued. Raises StorageError if the folder
        holds another model's map, or something else."""
        folder = cls(path)
        about = {"format": FORMAT, "model": model, "model_sha256": sha256}
        with folder.writing():
            path.mkdir(parents=True, exist_ok=True)
            if (path / "map.json").exists():
                found = folder.about()
                if found.get("model_sha256") != sha256:
                    raise StorageError(
                        f"{path} is the map of another model, {found.get('model')}",
                        "choose another folder with --out",
                    )
            elif any(name.name not in ("locks",) for name in path.iterdir()):
                raise StorageError(
                    f"{path} holds something else than a map", "choose another folder"
                )
            else:
                folder._write(path / "map.json", about)
            for name in FOLDERS:
                (path / name).mkdir(exist_ok=True)
        return folder

    def about(self) -> dict[str, Any]:
        """What map.json says."""
        return self._read(self.path / "map.json")

    def has(self, job: Job) -> bool:
        """Whether the cell is finished."""
        return (self.path / "cells" / f"{job.name}.json").exists()

    def cell(self, job: Job) -> Cell:
        """A finished cell."""
        return self._read(self.path / "cells" / f"{job.name}.json")

    def items(self, name: str) -> list[dict[str, Any]]:
        """The items of a finished cell; none of one that failed."""
        path = self.path / "items" / f"{name}.json"
        if not path.exists():
            return []
        found: list[dict[str, Any]] = self._read(path)["items"]
        return found

    def cells(self) -> list[Cell]:
        """All finished cells, by recipe and task as they were first asked for."""
        found = [self._read(path) for path in sorted((self.path / "cells").glob("*.json"))]
        return sorted(found, key=lambda c: (c.get("order", 0), c["name"]))

    def finish(self, name: str, cell: Cell, items: Sequence[Any] = ()) -> None:
        """Write a cell: its items first, so that a cell that is there is whole."""
        with self.writing():
            if items:
                self._write(self.path / "items" / f"{name}.json", {"items": list(items)})
            self._write(self.path / "cells" / f"{name}.json", cell)
            self.forget_attempts(name)

    def drop_failed(self, jobs: Sequence[Job]) -> None:
        """Delete those of these cells that an error ended, so that they are made again."""
        for job in jobs:
            with self.lock(job.name) as held, self.writing():
                if held and self.has(job) and self.cell(job)["status"] == "failed":
                    (self.path / "cells" / f"{job.name}.json").unlink()
                    self.log_file(job.name).unlink(missing_ok=True)

    def list_cells(self) -> None:
        """Write cells.jsonl anew."""
        lines = [json.dumps(listed(cell), ensure_ascii=False) + "\n" for cell in self.cells()]
        with self.writing(), whole_file(self.path / "cells.jsonl") as partial:
            partial.write_text("".join(lines), encoding="utf-8")

    def begin(self, name: str) -> int:
        """Note that a cell is begun, and say how often it was before."""
        with self.writing(), open(self.path / "attempts" / name, "a+", encoding="utf-8") as file:
            file.seek(0)
            before = len(file.readlines())
            file.write(f"{os.getpid()}\n")
        return before

    def forget_attempts(self, name: str) -> None:
        """What ended the attempts at a cell was none of its doing."""
        (self.path / "attempts" / name).unlink(missing_ok=True)

    def log_file(self, name: str) -> Path:
        """Where a cell's log goes."""
        return self.path / "logs" / f"{name}.log"

    def compiled_path(self, job: Job) -> Path:
        """Where the recipe's compiled model lies while it is needed."""
        return self.path / "compiled" / job.recipe_key

    def refusal(self, job: Job) -> Cell | None:
        """Why the recipe has no compiled model: a status and a reason."""
        path = self.path / "compiled" / f"{job.recipe_key}.json"
        return self._read(path) if path.exists() else None

    def refuse(self, job: Job, status: str, reason: str) -> None:
        """Note why the recipe has no compiled model."""
        with self.writing():
            path = self.path / "compiled" / f"{job.recipe_key}.json"
            self._write(path, {"status": status, "reason": reason})

    def drop_compiled(self, job: Job) -> None:
        """Delete the recipe's compiled model."""
        shutil.rmtree(self.compiled_path(job), ignore_errors=True)
        (self.path / "compiled" / f"{job.recipe_key}.json").unlink(missing_ok=True)

    @contextmanager
    def lock(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether this process now holds the name; with `wait` it does in the end."""
        with open(self.path / "locks" / name, "a", encoding="utf-8") as file:
            while not (held := _locked(file.fileno())) and wait:
                time.sleep(0.2)
            yield held

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the system says into a StorageError: finished cells are safe."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be written: {error.strerror or error}",
                "finished cells are kept; free some space, and the same command goes on",
            ) from error

    def _write(self, path: Path, value: Any) -> None:
        with whole_file(path) as partial, open(partial, "x", encoding="utf-8") as file:
            json.dump(json_plain(value), file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> Cell:
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{path}: cannot be read: {error}", "delete it: the cell is then made again"
            ) from None
        if not isinstance(found, dict):
            raise StorageError(f"{path}: is no object", "delete it: the cell is then made again")
        return found


def listed(cell: Cell) -> Cell:
    """The line of a cell: what there is no figure for is null."""
    return {field: json_plain(cell.get(field)) for field in FIELDS}


def json_plain(value: Any) -> Any:
    """JSON has no number for inf and nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: json_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_plain(item) for item in value]
    return value


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
