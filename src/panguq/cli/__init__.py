"""The command line: `panguq <command> …`. One file a command; this one only dispatches."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from panguq.cli import (
    check,
    compile_model,
    dumps,
    evaluate_model,
    explain,
    export_onnx,
    generate,
    listings,
    tune,
)
from panguq.errors import PanguqError

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
        generate,
        check,
        explain,
        tune,
        listings,
        dumps,
        export_onnx,
    )
    for module in modules:
        module.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit status: 0 it worked, 1 it did not, 2 wrong usage, 130 interrupted."""
    try:
        parsed = parser().parse_args(arguments)
        status: int = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except PanguqError as error:
        if os.environ.get("PANGUQ_TRACEBACK"):
            raise
        hint = f"\nhint: {error.hint}" if error.hint else ""
        print(f"error: {error.message}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # what the commands themselves write and read has errors of its own
        if os.environ.get("PANGUQ_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        with suppress(OSError):  # stdout may be what is full, and is flushed at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _version() -> str:
    import panguq

    return panguq.__version__
