"""A command that torchrun has started as several processes."""

from __future__ import annotations

import argparse
import os

from panguq.errors import InputError, PanguqError, RankError


def is_several() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process is the one that reads and writes places and reports."""
    return not is_several() or os.environ.get("RANK") == "0"


def says(error: BaseException) -> bool:
    """Whether this process is to say that error: the first does, unless it may be the one that has
    ended; a fault is known in full where it happened."""
    return is_first() or isinstance(error, RankError) or not isinstance(error, PanguqError)


def run_together(options: argparse.Namespace) -> int:
    """Run the command that was parsed, together with the other processes if there are some.

    Raises InputError for several processes of a command that works in one.
    """
    status: int
    if not is_several():
        status = options.run(options)
        return status
    if not options.together:
        raise InputError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, and this command works in "
            "one",
            "start it without torchrun; `compile` works in several",
        )
    from panguq.ranks import as_ranks, meet

    meet()
    with as_ranks():
        status = options.run(options)
    return status
