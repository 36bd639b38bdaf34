"""Every error panguq raises on purpose: what is wrong and where, then what to do about it."""

from __future__ import annotations


class PanguqError(Exception):
    """Base of panguq's errors. `message` says what is wrong and where, `hint` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message}\nHint: {hint}" if hint else message)


class RecipeError(PanguqError):
    """A recipe, or a pass order, that cannot mean anything.

    It quotes what a recipe says, which may be pages: message and hint are cut at 900 characters.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(_cut(message), _cut(hint))


class TraceError(PanguqError):
    """A model that cannot be turned into a graph."""


class InputError(PanguqError):
    """Input to a compiled model or to calibration that the graph cannot take."""


class NumericsError(PanguqError):
    """A tensor that is not finite, or a rewrite that changed what it must not change."""


class VerifyError(PanguqError):
    """A graph that breaks a property it claims to have: a defect of a pass."""


class LoweringError(PanguqError):
    """A matmul for which the target has no legal kernel."""


class ExportError(PanguqError):
    """A compiled model, or a part of it, that a format, or what loads it, cannot express."""


class StorageError(PanguqError):
    """A file or folder that is missing, damaged, or cannot be written."""


class RankError(PanguqError):
    """A process, of several that compile one model together, that has ended or failed."""


def _cut(text: str, most: int = 900) -> str:
    return text if len(text) <= most else f"{text[:most]} …"


def first_line(error: BaseException, typed: bool = False) -> str:
    """The first line of what an error says, or its type if it says nothing; both if `typed`."""
    kind = type(error).__name__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{kind}: {line}" if typed else line or kind
