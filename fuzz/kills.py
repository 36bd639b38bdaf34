"""A compile that is stopped at a random moment, and the same command once more.

Afterwards there are the bytes of a compile that nobody stopped, and nothing else. An old model that
`--force` was to replace is whole at every moment.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

from fuzz.commands import Ended, start, wait
from fuzz.kind import Case, Fault, Kind
from tests.model_folders import TEXT, make_folder, make_model

_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
_RECIPES = ("w4a16", "w8a8")
_TIMES = ("report.json", "manifest.json")
"""Files that say how long a compile took."""


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.iterdir()) if path.name not in _TIMES)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _prepare(folder: Path) -> Case:
    model = make_folder(folder / "model", make_model(num_hidden_layers=1, hidden_size=64))
    text = folder / "text.txt"
    text.write_text(TEXT)
    (folder / "tmp").mkdir()

    def command(recipe: str) -> list[object]:
        return ["compile", model, "--recipe", recipe, "--out", "out", "--calibration", text,
                "--windows", 2, "--window", 32]  # fmt: skip

    def begin(place: Path, recipe: str, *more: str) -> int:
        return start([*command(recipe), *more], place, env={"TMPDIR": str(folder / "tmp")})

    @functools.cache
    def whole(recipe: str) -> tuple[dict[str, str], float]:
        """The files of a compile that nobody stops, and how long it takes."""
        place = folder / recipe
        place.mkdir()
        began = time.monotonic()
        wait(begin(place, recipe), place).check(0)
        return _hashes(place / "out"), time.monotonic() - began

    def case(rng: random.Random) -> str:
        recipe, how, force = rng.choice(_RECIPES), rng.choice(_SIGNALS), rng.random() < 0.4
        wanted, seconds = whole(recipe)
        place = folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if force:
            shutil.copytree(folder / recipe / "out", place / "out")
        more = ["--force"] if force else []
        child = begin(place, recipe, *more)
        time.sleep(rng.random() * seconds * 1.1)
        os.kill(child, how)
        ended = wait(child, place)
        came = _check(ended, how, place / "out", wanted, force)
        if came != "done":
            wait(begin(place, recipe, *more), place).check(0)
        if _hashes(place / "out") != wanted:
            raise Fault("the second run gives other bytes")
        left = {path.name for path in place.iterdir()} - {"out", "stderr.txt"}
        if left:
            raise Fault(f"left over: {', '.join(sorted(left))}")
        if how != signal.SIGKILL and any((folder / "tmp").iterdir()):
            raise Fault("temporary files are left over")
        return came

    return case


def _check(ended: Ended, how: int, out: Path, wanted: dict[str, str], force: bool) -> str:
    """What the signal came upon. Raises Fault for a result that is not whole."""
    if out.exists() and _hashes(out) != wanted:
        raise Fault("the result is not whole")
    if force and not out.exists():
        aside = list(out.parent.glob(".out.replaced-*"))
        if len(aside) != 1 or _hashes(aside[0]) != wanted:
            raise Fault("the old model is gone")
    if ended.status == 0:
        return "done"
    if how == signal.SIGINT:
        ended.check(130)
        lines = [line for line in ended.err.splitlines() if line.startswith("interrupted")]
        if len(lines) != 1:
            raise Fault(f"an interrupt says {ended.err[-300:]!r}")
    elif ended.status != -how:
        raise Fault(f"status {ended.status} after {signal.Signals(how).name}")
    if out.exists() and not force:
        shutil.rmtree(out)  # saved, and stopped before it could say so; the rest is to be redone
        return "stopped after it was saved"
    return "stopped"


KIND = Kind("kills", "signals at random moments of a compile", _prepare, seconds=300)
