"""`python -m fuzz modules recipes --seed 7 --minutes 30`: attack, and say how to repeat a fault."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fuzz.kind import judge
from fuzz.kinds import KINDS
from fuzz.run import attack


def main() -> int:
    """0 if nothing was found. The last lines say what was, each with the command to repeat it."""
    names = [kind.name for kind in KINDS]
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(names)}; all")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=30.0, help="of all kinds together")
    parser.add_argument("--cases", type=int, help="at most so many of each kind")
    parser.add_argument("--case", type=int, help="this one alone, with its traceback")
    parser.add_argument("--go-on", action="store_true", help="do not stop at the first fault")
    asked = parser.parse_args()
    unknown = [name for name in asked.kinds if name not in names]
    if unknown:
        parser.error(f"no kind {unknown[0]!r}; the kinds are {', '.join(names)}")
    chosen = [kind for kind in KINDS if not asked.kinds or kind.name in asked.kinds]
    if asked.case is not None:
        for kind in chosen:
            with tempfile.TemporaryDirectory() as folder:
                came = judge(kind, kind.prepare(Path(folder)), asked.seed, asked.case)
            print(f"{kind.name}, seed {asked.seed}, case {asked.case}: {came}")
        return 0
    faults: list[str] = []
    end = time.monotonic() + 60 * asked.minutes
    for left, kind in zip(range(len(chosen), 0, -1), chosen, strict=True):
        numbers = iter(range(asked.cases)) if asked.cases else itertools.count()
        now = time.monotonic()
        tally = attack(kind, asked.seed, numbers, now + (end - now) / left, asked.go_on)
        print(tally, flush=True)
        faults += tally.repeats()
        if faults and not asked.go_on:
            break
    for line in faults:
        print(line)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
