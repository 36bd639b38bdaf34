"""Progress of long work: a line on stderr, and nothing where stderr is no terminal."""

from __future__ import annotations

import sys
import time

from panguq.passes.base import Progress, no_progress


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
        note = f"{left:.0f} s left" if 0 < done < total else f"{now - begin:.1f} s"
        line = f"\r\033[K{what}: {done}/{total}, {note}"
        print(line, end="\n" if done >= total else "", file=sys.stderr, flush=True)
        if done >= total:
            started.pop(what, None)

    return show
