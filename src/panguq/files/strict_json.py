"""JSON as panguq writes it; anything else that is read is refused with one clear error."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from panguq.errors import StorageError


def json_text(value: Any, sort_keys: bool = False) -> str:
    """A value as the files of a model's folder spell it."""
    return json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n"


def parse_json(text: str | bytes, source: str, infinities: bool = False) -> Any:
    """The value of a JSON text. Raises StorageError, naming `source`, for anything else.

    Also refused: NaN and, without `infinities`, Infinity, which are not JSON, and a key that occurs
    twice.
    """
    constants = _infinity if infinities else _refuse_constant
    try:
        return json.loads(text, parse_constant=constants, object_pairs_hook=_unique)
    except RecursionError:
        raise StorageError(f"{source}: nested too deeply", _DAMAGED) from None
    except ValueError as error:  # bad syntax, bad UTF-8, integers of thousands of digits
        raise StorageError(f"{source}: not JSON: {error}", _DAMAGED) from error


_DAMAGED = "the file is damaged or not panguq's; save it again"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _infinity(name: str) -> float:
    return float(name) if name in ("Infinity", "-Infinity") else _refuse_constant(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(key for key, _ in pairs[:5])}")
    return result
