"""Progress of long work: a line on stderr, and nothing where stderr is no terminal."""

from __future__ import annotations

import sys
import time

from panguq.ir.run.sweep import Progress
from panguq.passes.pipeline.base import no_progress


def terminal_progress() -> Progress:
    """A Progress that redraws one line on stderr, with the time left as it looks so far."""
    if not sys.stderr.isatty():
        return no_progress
    started: dict[str, float] = {}
    drawn = 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal drawn
        now = time.monotonic()
        begin = started.setdefault(what, now)
        if done < total and now - drawn < 0.1:
            return
        drawn = now
        left = (now - begin) / done * (total - done) if done else 0.0
        note = f"{duration(left)} left" if 0 < done < total else duration(now - begin)
        line = f"\r\033[K{what}: {done}/{total}, {note}"
        print(line, end="\n" if done >= total else "", file=sys.stderr, flush=True)
        if done >= total:
            started.pop(what, None)

    return show


def duration(seconds: float) -> str:
    """A time to read: `4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    )
