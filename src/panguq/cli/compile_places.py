"""Where `panguq compile` writes: checked before the work, and held during it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from panguq.errors import StorageError

if TYPE_CHECKING:
    from panguq.tensors.work_folder import WorkFolder


@dataclass
class Places:
    """The folder of the finished parts, if there is one, and whether the result was saved."""

    units: WorkFolder | None
    saved: bool = False


def check_out(out: Path, force: bool, format: str) -> None:
    """Refuse before the long work what saving would refuse after it. Raises StorageError."""
    from panguq.files.partial_folder import check_name
    from panguq.formats.registry import find_format

    try:
        target = out.resolve()
        check_name(target)
        if target.exists() and not force:
            raise StorageError(f"{out} already exists", "choose another, or pass --force")
        find_format(format).check_place(target, force)
        with tempfile.TemporaryFile(dir=existing_parent(target)):
            pass
    except OSError as error:
        raise StorageError(
            f"{out}: cannot be written: {error.strerror or error}", "choose another place"
        ) from error


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextmanager
def held_places(out: Path | None, work_dir: Path | None) -> Iterator[Places]:
    """Both places as this process's alone; the parts go once `saved` is set, and only then.

    `.NAME.work` beside the result NAME is held in any case: who holds it writes the result. By
    default the parts are in it, on the disk of the result, which then shares the large ones. What
    ends the work otherwise leaves the finished parts and gets a note that says so. Raises
    StorageError for places that another compile holds, or that hold something else.
    """
    from panguq.tensors.work_folder import WorkFolder

    default = None if out is None else out.resolve().with_name(f".{out.resolve().name}.work")
    chosen = default if work_dir is None else work_dir.resolve()
    if out is not None and chosen is not None and chosen != default:
        _check_apart(out.resolve(), chosen)
    beside = default if default != chosen else None
    claim = None if beside is None else WorkFolder(beside)
    try:
        places = Places(None if chosen is None else WorkFolder(chosen))
        try:
            yield places
        except BrokenPipeError as error:  # no result yet: it is not as if its reader had left
            broken = StorageError("whoever reads this command's output has left", "run it again")
            _note_how_to_go_on(places, broken)
            raise broken from error
        except BaseException as error:
            _note_how_to_go_on(places, error)
            raise
        finally:
            _leave(places)
    finally:
        if claim is not None:
            claim.leave()


def _check_apart(out: Path, work: Path) -> None:
    if out == work or out in work.parents or work in out.parents:
        raise StorageError(
            f"the result {out} and the folder of the parts {work} lie in one another",
            "choose another --work-dir",
        )


def _leave(places: Places) -> None:
    if places.units is None:
        return
    if places.saved:
        places.units.remove()
    else:
        places.units.leave()


def _note_how_to_go_on(places: Places, error: BaseException) -> None:
    """Let the error say what was kept, for the one place that prints it."""
    if places.saved:
        return
    if places.units is not None and places.units.holds_units:
        path = places.units.path
        error.add_note(f"finished parts are kept: the same command goes on from them in {path}")
    elif isinstance(error, KeyboardInterrupt):
        error.add_note("nothing was finished, and nothing is kept")


@contextmanager
def saved(out: Path | None) -> Iterator[None]:
    """Whatever ends the block says that the model is saved."""
    try:
        yield
    except BaseException as error:
        if out is not None:
            error.add_note(f"the model is saved: {out}")
        raise
