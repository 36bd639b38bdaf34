"""What a kind of attack is, and how one case of it is judged."""

from __future__ import annotations

import random
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from panguq.errors import PanguqError, VerifyError

Case = Callable[[random.Random], str]
"""Tries what it draws and says in a word or two what came of it: "compiled". A PanguqError counts
as "refused". It changes nothing that another case reads, so that a case can be repeated alone."""

LONGEST_MESSAGE = 2000
MOST_BYTES = 2 << 30
REFUSED = "refused"


@dataclass(frozen=True)
class Kind:
    """An attack.

    prepare: makes what all cases read, in an empty folder of its own, and returns `Case`.
    seconds: a case that takes longer hangs.
    """

    name: str
    what: str
    prepare: Callable[[Path], Case]
    seconds: float = 60.0


class Fault(Exception):
    """What a case found: raised by cases for wrong results, by `judge` for all else."""


class _Late(BaseException):
    """Raised by the alarm. No Exception, so that nothing under test catches it."""


def judge(kind: Kind, case: Case, seed: int, number: int) -> str:
    """What came of this case. Raises Fault, from the exception that it is about, if it is one."""
    drawn = random.Random(f"{seed}/{kind.name}/{number}")
    before = _peak_bytes()
    try:
        with _alarm(kind.seconds):
            came = case(drawn)
    except PanguqError as error:
        _check_error(error)
        came = REFUSED
    except Fault:
        raise
    except _Late as late:
        raise Fault(f"hangs: not done after {kind.seconds:g} s, {_place(late)}") from late
    except Exception as error:
        raise Fault(f"{type(error).__name__}: {_line(error)}, {_place(error)}") from error
    grown = _peak_bytes() - before
    if grown > MOST_BYTES:
        raise Fault(f"takes {grown / 2**30:.1f} GiB of memory")
    return came


def _check_error(error: PanguqError) -> None:
    """Raises Fault for an error that blames panguq, or that nobody could read."""
    text = str(error)
    if isinstance(error, VerifyError) or "defect of the pass" in text:
        raise Fault(f"blames panguq: {_line(error)}") from error
    if len(text) > LONGEST_MESSAGE:
        raise Fault(f"a message of {len(text)} characters: {_line(error)}") from error
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Fault(f"a message that cannot be printed: {_line(error)}") from error


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _place(error: BaseException) -> str:
    """Where it arose: the innermost file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise _Late

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
