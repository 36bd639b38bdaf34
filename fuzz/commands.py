"""A command of panguq in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzz.kind import Fault
from panguq.cli import main


@dataclass(frozen=True)
class Ended:
    """status: as a shell says it, -9 for a process that was killed so; None if it had to be ended.
    err: what it wrote to stderr."""

    status: int | None
    err: str

    def check(self, *statuses: int) -> None:
        """Raises Fault unless it ended so, with a sentence for everything that went wrong."""
        if self.status is None:
            raise Fault("the command hangs")
        if "Traceback" in self.err or "a fault of panguq" in self.err:
            raise Fault(f"a traceback: {' '.join(self.err.split())[-300:]}")
        if self.status not in statuses:
            raise Fault(f"status {self.status}: {' '.join(self.err.split())[-300:]}")
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if self.status == 1 and len(lines) != 1:
            raise Fault(f"{len(lines)} errors for status 1: {self.err[-300:]}")


def start(
    arguments: Sequence[object],
    folder: Path,
    env: Mapping[str, str | None] | None = None,
    limits: Mapping[int, int] | None = None,
    before: Callable[[], object] = lambda: None,
    stdout: str = os.devnull,
) -> int:
    """Begin `panguq ARGUMENTS` in `folder`, its stderr in a file there; returns the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.chdir(folder)
        for stream, name in ((1, stdout), (2, "stderr.txt")):
            handle = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(handle, stream)
            os.close(handle)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for key, value in (env or {}).items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        tempfile.tempdir = None
        before()
        for which, most in (limits or {}).items():
            resource.setrlimit(which, (most, most))
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait(child: int, folder: Path, seconds: float = 120.0) -> Ended:
    """How the process ended, or was ended after this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            err = (folder / "stderr.txt").read_text(errors="replace")
            return Ended(os.waitstatus_to_exitcode(status), err)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return Ended(None, "")
