"""Sizes as text, `past + seq` or `2*heads_0`, and back: names, integers, + - * // and ( ).

This grammar is all that a size in a file can be. It is read here by hand, because the usual
ways to read an expression execute it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from panguq.errors import StorageError

_TOKEN = re.compile(r"\s*(?:(?P<int>[0-9]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<op>//|[-+*()]))")
_LONGEST = 500  # characters; also bounds the nesting
_DEEPEST = 40


def evaluate_size(text: str, sizes: Mapping[str, Any]) -> Any:
    """The value of a size expression, each name standing for `sizes[name]`.

    The values may be integers or anything with integer arithmetic, such as SymInt. Raises
    StorageError for text outside the grammar or an unknown name.
    """
    return _Parser(text, sizes).parse()


def names_in(text: str) -> list[str]:
    """The names in a size expression, in order of first use. Raises StorageError as above."""
    return list(dict.fromkeys(word for kind, word in _tokens(text) if kind == "name"))


def _tokens(text: str) -> list[tuple[str, str]]:
    found, position, stop = [], 0, len(text.rstrip())
    if stop > _LONGEST:
        raise StorageError(f"size expression of {stop} characters: {text[:40]!r}…", _GRAMMAR)
    while position < stop:
        match = _TOKEN.match(text, position)
        if match is None:
            raise StorageError(
                f"size {text!r}: unexpected {text[position:].strip()[:1]!r}", _GRAMMAR
            )
        found.append((str(match.lastgroup), match[str(match.lastgroup)]))
        position = match.end()
    return found


_GRAMMAR = "a size is made of names, integers, + - * // and parentheses"


class _Parser:
    """Recursive descent: sum of products of (negated) atoms, left to right."""

    def __init__(self, text: str, sizes: Mapping[str, Any]) -> None:
        self.text = text
        self.sizes = sizes
        self.tokens = [*_tokens(text), ("end", "")]
        self.depth = 0

    def parse(self) -> Any:
        value = self.sum()
        if self.tokens[0][0] != "end":
            raise self.error(f"unexpected {self.tokens[0][1]!r}")
        return value

    def sum(self) -> Any:
        value = self.product()
        while self.tokens[0][1] in ("+", "-"):
            plus = self.tokens.pop(0)[1] == "+"
            right = self.product()
            value = value + right if plus else value - right
        return value

    def product(self) -> Any:
        value = self.atom()
        while self.tokens[0][1] in ("*", "//"):
            times = self.tokens.pop(0)[1] == "*"
            right = self.atom()
            if not times and isinstance(right, int) and right == 0:
                raise self.error("division by zero")
            value = value * right if times else value // right
        return value

    def atom(self) -> Any:
        kind, word = self.tokens.pop(0)
        if kind == "int":
            if len(word) > 18:
                raise self.error("an integer beyond 64 bits")
            return int(word)
        if kind == "name":
            if word not in self.sizes:
                raise self.error(f"unknown name {word!r}")
            return self.sizes[word]
        self.depth += 1
        if word not in ("-", "(") or self.depth > _DEEPEST:
            raise self.error(f"unexpected {word!r}" if word else "it ends too early")
        if word == "-":
            value = -self.atom()
        else:
            value = self.sum()
            if self.tokens.pop(0)[1] != ")":
                raise self.error("a parenthesis is not closed")
        self.depth -= 1
        return value

    def error(self, problem: str) -> StorageError:
        return StorageError(f"size {self.text!r}: {problem}", _GRAMMAR)
