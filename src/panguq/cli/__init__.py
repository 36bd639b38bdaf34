"""The command line: `panguq <command> …`. One file a command; this one only dispatches."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

# Whatever ends a command is said with what is in memory already: it may be that no file opens.
from panguq.cli.failure import said, say, silence_stdout
from panguq.cli.several import run_together, says
from panguq.errors import StorageError

_EXAMPLE = """\
examples:
  panguq compile MODEL_DIR --recipe w8a8 --calibration text.txt --out OUT
  panguq eval OUT --against MODEL_DIR --text other.txt
  panguq generate OUT --prompt "Once upon a time"
  panguq explain 128x256x2048 --scheme w8a8 --target ascend910b1

`panguq COMMAND --help` tells more. Set PANGUQ_TRACEBACK=1 to see where an error comes from.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, from parsed arguments to an exit status."""
    from panguq.cli import (
        accuracy_map,
        advise,
        check,
        compile_model,
        dumps,
        evaluate_model,
        explain,
        export_onnx,
        generate,
        listings,
        selftest,
        tune,
    )

    top = argparse.ArgumentParser(
        prog="panguq",
        description="Quantize and compile large language models.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"panguq {_version()}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    modules = (
        compile_model,
        evaluate_model,
        accuracy_map,
        generate,
        check,
        explain,
        advise,
        tune,
        selftest,
        listings,
        dumps,
        export_onnx,
    )
    for module in modules:
        module.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0 it worked, 1 it did not, 2 wrong usage, 130 interrupted."""
    before = signal.getsignal(signal.SIGINT)
    pressed = _remember_interrupts()
    try:
        _prepare()
        _check_here()  # some libraries end the process where there is no folder
        parsed = parser().parse_args(arguments)
        status = run_together(parsed)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        silence_stdout()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt) or bool(pressed)
        if os.environ.get("PANGUQ_TRACEBACK") and isinstance(error, Exception):
            raise
        command = ["panguq", *(sys.argv[1:] if arguments is None else arguments)]
        if says(error):
            say(said(error, command, interrupted=interrupted))
        silence_stdout()
        return 130 if interrupted else 1
    finally:  # of a process that ends here, nothing is left to be interrupted
        with suppress(ValueError, TypeError):  # not the main thread; not set by Python
            signal.signal(signal.SIGINT, signal.SIG_IGN if arguments is None else before)


def _remember_interrupts() -> list[int]:
    """A list that Ctrl-C adds to. Python raises KeyboardInterrupt wherever it is, in the middle of
    an import too, and a library may catch it there and fail later, with an error of any kind."""
    pressed: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    # Who ignores it, as a shell does for what it starts in the background, keeps ignoring it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, interrupt)
    return pressed


def _prepare() -> None:
    """See to it that no file takes the number of a closed stream, which C code would write to, and
    that a log nobody can read costs nothing."""
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    logging.raiseExceptions = False


def _check_here() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise StorageError(
            "the current folder was deleted", "change to a folder that is there"
        ) from None


def _version() -> str:
    import panguq

    return panguq.__version__
