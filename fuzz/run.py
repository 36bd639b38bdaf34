"""Runs cases of a kind in a process of its own, since a case may crash it or stop it for good."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.kind import Fault, Kind, judge

STARTING = 300.0
"""Seconds in which `prepare` must be done."""
GRACE = 15.0
"""Seconds beyond a case's own until its process is ended from outside."""


@dataclass
class Tally:
    """What came of a kind's cases, and the faults by case number."""

    kind: Kind
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        came = ", ".join(f"{n} {what}" for what, n in sorted(self.outcomes.items()))
        total = sum(self.outcomes.values()) + len(self.faults)
        faults = f", {len(self.faults)} FAULTS" if self.faults else ""
        return f"{self.kind.name}: {total} cases: {came}{faults}"

    def repeats(self) -> Iterator[str]:
        """A line for each fault: the command that repeats it, and what it is."""
        for number, fault in self.faults.items():
            yield f"python -m fuzz {self.kind.name} --seed {self.seed} --case {number}  # {fault}"


def attack(kind: Kind, seed: int, numbers: Iterator[int], until: float, go_on: bool) -> Tally:
    """Cases of these numbers until the clock (`time.monotonic`) says `until`.

    Stops at the first fault unless it is to go on.
    """
    tally = Tally(kind, seed)
    while time.monotonic() < until:
        if not _one_process(tally, numbers, until, go_on) or (tally.faults and not go_on):
            break
    return tally


def _one_process(tally: Tally, numbers: Iterator[int], until: float, go_on: bool) -> bool:
    """Run cases in a child until it ends; whether there are more to run."""
    reading, writing = os.pipe()
    asking, asked = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.close(asked)
        _child(tally.kind, tally.seed, asking, writing)
    os.close(writing)
    os.close(asking)
    try:
        return _feed(tally, numbers, until, go_on, reading, asked)
    finally:
        os.close(asked)
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _feed(
    tally: Tally, numbers: Iterator[int], until: float, go_on: bool, reading: int, asked: int
) -> bool:
    answers = _answers(reading)
    limit, number = STARTING, -1
    while True:
        answer = answers.next_within(limit)
        if answer is None:
            how = "never ends" if answers.is_open else "ends the process"
            tally.faults[number] = "its set-up fails" if number < 0 else how
            return number >= 0
        if "fault" in answer:
            tally.faults[number] = answer["fault"]
        elif "came" in answer:
            tally.outcomes[answer["came"]] += 1
        if time.monotonic() >= until or (tally.faults and not go_on):
            return False
        following = next(numbers, None)
        if following is None:
            return False
        number, limit = following, tally.kind.seconds + GRACE
        os.write(asked, f"{number}\n".encode())


class _answers:
    """Lines of JSON from a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.buffer, self.is_open = pipe, b"", True

    def next_within(self, seconds: float) -> dict[str, str] | None:
        """The next one; None if none comes, `is_open` then says whether one still might."""
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            some = os.read(self.pipe, 1 << 16)
            if not some:
                self.is_open = False
                return None
            self.buffer += some
        line, self.buffer = self.buffer.split(b"\n", 1)
        answer: dict[str, str] = json.loads(line)
        return answer


def _child(kind: Kind, seed: int, asking: int, writing: int) -> None:
    """Answer case numbers until none comes. Never returns."""
    folder = Path(tempfile.mkdtemp(prefix="panguq-fuzz-"))
    try:
        _silence()
        case = kind.prepare(folder)
        _answer(writing, {})
        for line in os.fdopen(asking):
            try:
                _answer(writing, {"came": judge(kind, case, seed, int(line))})
            except Fault as fault:
                _answer(writing, {"fault": str(fault)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def _answer(writing: int, answer: dict[str, str]) -> None:
    os.write(writing, json.dumps(answer).encode() + b"\n")


def _silence() -> None:
    """What is under test may print as it likes."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(nowhere, stream)
