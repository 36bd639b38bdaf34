"""Peak memory and age of this process, read from Linux's /proc; needs no package."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
SAMPLE_SECONDS = 0.02


def status_mib(key: str) -> float:
    """A size of /proc/self/status in MiB; `VmHWM` is the peak of resident memory so far."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) / 1024
    raise ValueError(f"{_STATUS} has no {key}")


def process_seconds() -> float:
    """Seconds since this process started, imports included."""
    # The command's name, in parentheses, may hold blanks; starttime is field 22 of the line.
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class PeakMemory:
    """Samples RssAnon while its block runs: memory that no file stands behind.

    `anonymous_mib` is the greatest sample; `resident_mib` is VmHWM, which the kernel keeps: it
    counts mapped weight files, too, and everything since the process started.
    """

    def __init__(self) -> None:
        self.anonymous_mib = status_mib("RssAnon")
        self.resident_mib = status_mib("VmHWM")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self.anonymous_mib = max(self.anonymous_mib, status_mib("RssAnon"))
        self.resident_mib = status_mib("VmHWM")

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.anonymous_mib = max(self.anonymous_mib, status_mib("RssAnon"))
