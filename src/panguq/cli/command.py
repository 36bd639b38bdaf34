"""What the commands share: their parsers' form, JSON output, and reading texts."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from panguq.errors import InputError

Commands = Any
"""What `add_subparsers` returns; argparse has no public name for it."""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[..., int],
    text: str,
    example: str,
    together: bool = False,
) -> argparse.ArgumentParser:
    """A command's parser. `text` is its description; its first sentence is the short help.

    `together`: several processes may run it together (`several.py`).
    """
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text.split(". ")[0].rstrip("."),
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run, together=together)
    return added


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def whole(least: int, largest: int) -> Callable[[str], int]:
    """The type of an option whose value is a whole number in these bounds, both included."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number") from None
        if value < least:
            below = "above zero" if least == 1 else f"{least} or more"
            raise argparse.ArgumentTypeError(f"{text[:40]} is not {below}")
        if value > largest:
            raise argparse.ArgumentTypeError(f"{text[:40]} is more than {largest}")
        return value

    return number


def finite(text: str) -> float:
    """The type of an option whose value is a number, and neither infinite nor nan."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


counted = whole(1, 10**6)
"""Windows, sampled pieces, sequences: a million of them takes days."""
tokens = whole(1, 2**24)
"""Tokens in a window, a prompt or an answer: more than any model's positions."""


def print_json(value: Any) -> None:
    """JSON on stdout; what JSON has no number for (inf, nan) is null."""
    print(json.dumps(_plain(value), indent=1, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def text_windows(
    path: Path, what: str, tokenizer: Any, window: int, windows: int, chat: bool = False
) -> Any:
    """Token windows `[windows, window]` of a file's texts, one after another.

    The file is read as calibration data is; with `chat` each of its lines is a conversation.
    Raises InputError that names the file and `what` it should have been.
    """
    from panguq.data.calibration_data import file_text
    from panguq.data.calibration_tokens import token_windows

    text = file_text(path, tokenizer, window, windows, chat)
    if not text:
        raise InputError(f"{path}: empty", f"give {what} with some pages of text")
    try:
        return token_windows(text, tokenizer, window, windows)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from None


def quiet_transformers() -> None:
    """No progress bars and no advice from transformers where nobody watches."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
