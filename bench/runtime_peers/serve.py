"""A measuring process: reads what to run, one line each, and answers with the time that it took.

Nothing here imports panguq or torch: it runs in every peer's environment.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable

PREFILL_TOKENS = 512
PAST_TOKENS = 128
DECODE_TOKENS = 16
VOCABULARY = 49152  # SmolLM2's; other tokens every time, so that no engine finds its own cache


def serve(generate: Callable[[list[int], int], object]) -> None:
    """Answer `prefill` and `decode` lines until the input ends.

    `generate` reads tokens and computes so many more, one at a time. A decoded token's time is what
    `DECODE_TOKENS` more of them take, divided by their number.
    """
    answer({"ready": True})
    numbers = random.Random(0)
    for line in sys.stdin:
        kind = line.strip()
        tokens = [numbers.randrange(100, VOCABULARY) for _ in range(PREFILL_TOKENS)]
        clock = Clock()
        if kind == "prefill":
            generate(tokens, 1)
            found = clock.stop()
        else:
            generate(tokens[:PAST_TOKENS], 1)
            first = clock.stop()
            clock = Clock()
            generate(tokens[-PAST_TOKENS:], 1 + DECODE_TOKENS)
            more = clock.stop()
            found = {name: (more[name] - first[name]) / DECODE_TOKENS for name in more}
        answer(found)


class Clock:
    """Wall time and the process's own, in milliseconds."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """Since it was made."""
        return {
            "wall": (time.perf_counter() - self.wall) * 1e3,
            "cpu": (time.process_time() - self.cpu) * 1e3,
        }


def answer(found: object) -> None:
    """One line of JSON on what was standard output at the start."""
    print(json.dumps(found), file=_OUTPUT, flush=True)


# Engines print what they like; it goes to the log.
_OUTPUT = sys.stdout
sys.stdout = sys.stderr
