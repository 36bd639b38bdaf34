"""Commands where something is missing or full: one sentence, the right status, no half result."""

from __future__ import annotations

import os
import random
import resource
import shutil
import string
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.commands import Ended, start, wait
from fuzz.kind import Case, Fault, Kind
from panguq.compiled_model import load
from panguq.errors import PanguqError
from tests.model_folders import TEXT, make_folder, make_model


@dataclass
class _Surroundings:
    """What a case changes of the command and of where it runs."""

    out: str = "out"
    more: list[object] = field(default_factory=list)
    env: dict[str, str | None] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    before: Callable[[], object] = lambda: None
    stdout: str = os.devnull
    statuses: tuple[int, ...] = (0, 1)


def _small_disk(place: Path, rng: random.Random) -> Path:
    """A disk of a few hundred KiB; an ordinary folder for who may mount none."""
    disk = place / "disk"
    disk.mkdir()
    size = f"size={rng.choice((20, 64, 200, 300, 700, 2000))}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True)
    if done.returncode == 0 and rng.random() < 0.2:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=False, capture_output=True)
    return disk


def _draw(place: Path, rng: random.Random) -> _Surroundings:
    found = _Surroundings()
    kinds = rng.sample(sorted(_CHANGES), k=rng.choice((1, 1, 2)))
    for kind in kinds:
        _CHANGES[kind](found, place, rng)
    return found


def _disk(found: _Surroundings, place: Path, rng: random.Random) -> None:
    disk = _small_disk(place, rng)
    what = rng.choice(("out", "dump", "work", "tmp"))
    if what == "out":
        found.out = str(disk / "out")
    elif what == "tmp":
        found.env["TMPDIR"] = str(disk)
    else:
        found.more += [{"dump": "--dump", "work": "--work-dir"}[what], disk / what]


def _file_size(found: _Surroundings, place: Path, rng: random.Random) -> None:
    sizes = (2000, 4000, 20_000, 100_000, 400_000)  # stderr is a file, too
    found.limits[resource.RLIMIT_FSIZE] = rng.choice(sizes)


def _few_files(found: _Surroundings, place: Path, rng: random.Random) -> None:
    found.limits[resource.RLIMIT_NOFILE] = rng.randrange(4, 40)


def _variables(found: _Surroundings, place: Path, rng: random.Random) -> None:
    for name in ("TMPDIR", "HOME", "USER", "PANGUQ_DUMP", "XDG_CACHE_HOME"):
        if rng.random() < 0.4:
            choices = (None, "/nonexistent/x", "/proc", str(place / "x"), "/dev/null", "\udcff")
            found.env[name] = rng.choice(choices)


def _name(found: _Surroundings, place: Path, rng: random.Random) -> None:
    length = rng.choice((1, 200, 228, 229, 230, 231, 236, 237, 238, 239, 240, 250, 255, 256, 5000))
    found.out = "".join(rng.choice(string.ascii_letters + "é ü.") for _ in range(length))


def _numbers(found: _Surroundings, place: Path, rng: random.Random) -> None:
    option = rng.choice(("--seed", "--sampled", "--windows", "--window"))
    value = rng.choice((0, -1, 1, 7, 10**6 + 1, 2**31, 2**63, 2**64, 2**70, 10**400, "", "x", 1.5))
    found.more += [f"{option}={value}"]
    found.statuses = (0, 1, 2)


def _stdout(found: _Surroundings, place: Path, rng: random.Random) -> None:
    found.stdout = "/dev/full"
    if rng.random() < 0.5:
        found.more.append("--json")


def _no_folder(found: _Surroundings, place: Path, rng: random.Random) -> None:
    def leave() -> None:
        gone = place / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    found.before = leave


_CHANGES = {
    "disk": _disk, "file size": _file_size, "few files": _few_files, "variables": _variables,
    "name": _name, "numbers": _numbers, "stdout": _stdout, "no folder": _no_folder,
}  # fmt: skip


def _prepare(folder: Path) -> Case:
    model = make_folder(folder / "model", make_model(num_hidden_layers=1, hidden_size=64))
    text = folder / "text.txt"
    text.write_text(TEXT)
    place = folder / "case"

    def case(rng: random.Random) -> str:
        place.mkdir()
        try:
            given = _draw(place, rng)
            command = ["compile", model, "--recipe", "w8a8", "--out", given.out, "--calibration",
                       text, "--windows", 2, "--window", 16, *given.more]  # fmt: skip
            child = start(command, place, given.env, given.limits, given.before, given.stdout)
            ended = wait(child, place)
            ended.check(*given.statuses)
            return _look(ended, place / given.out)
        finally:  # lazily: the model that was looked at may still be mapped
            subprocess.run(["umount", "-l", place / "disk"], check=False, capture_output=True)
            shutil.rmtree(place)

    return case


def _look(ended: Ended, out: Path) -> str:
    """Whether the result is there or not, as was said. Raises Fault."""
    try:
        is_there = out.is_dir() and out.name not in ("", ".", "..")
    except OSError:
        is_there = False
    if is_there:
        try:
            load(out)
        except PanguqError as error:
            raise Fault(f"the result is not whole: {error.message[:200]}") from error
    if ended.status == 0 and not is_there:
        raise Fault("status 0, and there is no result")
    if ended.status == 1 and is_there != ("the model is saved" in ended.err):
        raise Fault(f"the result is {'' if is_there else 'not '}there: {ended.err[-200:]}")
    left = [path.name for path in out.parent.glob(".*.partial-*")] if is_there else []
    if left:
        raise Fault(f"left over: {left[0]}")
    return {0: "worked", 1: "one sentence", 2: "wrong usage"}[ended.status or 0]


KIND = Kind("environments", "full disks, few descriptors, odd names, closed streams", _prepare, 200)
