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
    commands: Commands, name: str, run: Callable[..., int], text: str, example: str
) -> argparse.ArgumentParser:
    """A command's parser. `text` is its description; its first sentence is the short help."""
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text.split(". ")[0].rstrip("."),
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(run=run)
    return added


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def positive(text: str) -> int:
    """An option's value that must be a whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


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


def read_text(path: Path, what: str) -> str:
    """A text file. Raises InputError, naming the file, if it is missing, empty or not text."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", f"give {what}, a text file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder", f"give {what}, a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason}", f"give {what}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", f"give {what}") from error
    if not text.strip():
        raise InputError(f"{path}: empty", f"give {what} with some pages of text")
    return text


def text_windows(path: Path, what: str, tokenizer: Any, window: int, windows: int) -> Any:
    """Token windows `[windows, window]` of a text file. Raises InputError that names the file."""
    from panguq.calibration import token_windows

    text = read_text(path, what)
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
