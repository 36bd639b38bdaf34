"""Recipes as files and as mappings: damaged text, and Python values of every sort.

What is accepted must survive `to_yaml` and the way back.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import math
import random
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz.kind import Case, Fault, Kind
from panguq.pass_options import passes_by_name
from panguq.recipe import Recipe, preset_names
from panguq.registry import all_passes
from panguq.schedule import check_passes

_PASSES = passes_by_name()
_NAMES = (*_PASSES, *(step.name for step in all_passes()), "", "Smoothquant", "x" * 1000)
_GLOBS = ("*", "*.down_proj", "model.layers.[0-1].*", "[", "[!", "**", "?" * 50, "lm_head", "[]a]",
          "\\", "*" * 2000)  # fmt: skip
_SCHEMES = ("W8A8", "W4A16", "FLOAT", "W8A8_DYNAMIC", "W4A16-g32", "W3A16", "W2A16", "W1A16",
            "W1A16-sym", "W4A8", "W4A4", "w4a16-G64", "W4A16-g0", "W4A16-g-1", "W4A16-g64-g32",
            "W4A16-sym-asym", "W8A16-g32", "W0A0", "W17A99", "FLOAT-g64", " W8A8 ",
            "W8A8-per_channel")  # fmt: skip
_PLAIN = (None, True, False, 0, 1, -1, 3, 100, 128, 2**62, -(2**63), 2**63, 10**400, 0.0, -0.0,
          0.5, 1.0, 1e-320, 1e308, math.nan, math.inf, "", " ", "*", "\x00", "\ud800", "\u202e",
          "~", "1e5", "null", "a\nb", "a" * 100_000, "search", "split", "mse", "norm_linear", [],
          {}, [[]], ["norm_linear"], [["*", 0.5]], {"a": {}}, {"*": "W8A8"}, {"decode": [1]},
)  # fmt: skip
_INSERTED = (
    b"&a ", b"*a ", b"!!python/name:os.system ", b"!!binary ", b"<<: ", b"? ", b"- ", b": ", b"{",
    b"[", b"]", b"}", b"'", b'"', b"|\n", b">\n", b"#", b"\t", b"%YAML 1.1\n", b"---\n", b"...\n",
    b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"~", b".nan", b".inf", b"1e999", b"0o17", b"1_000",
    b"1:20:30", b"2020-01-01", b"=", b"!!set {a}", b"\xe2\x80\xa8", b"\r", b"9" * 5000, b"null",
    b"-1", b"[" * 500, b"{a: " * 500, b"- " * 2000, b"? " * 1000,
)  # fmt: skip


def _nested(depth: int, item: Any = None) -> Any:
    for _ in range(depth):
        item = {"a": item} if depth % 2 else [item]
    return item


def _cyclic() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def _odd(rng: random.Random) -> Any:
    """A value that no file could hold, or that is made to hurt."""
    return rng.choice((
        lambda: object(), lambda: type, lambda: Recipe, lambda: lambda: 0, lambda: b"x",
        lambda: {1, 2}, lambda: range(3), lambda: complex(1, 2), lambda: decimal.Decimal("1.5"),
        lambda: datetime.date(2020, 1, 1), lambda: np.float32(0.5), lambda: np.array([1, 2]),
        lambda: torch.tensor(0.5), _cyclic,
        lambda: _nested(rng.choice((50, 51, 2000, 2001, 100_000))),
    ))()  # fmt: skip


def _value(rng: random.Random) -> Any:
    return _odd(rng) if rng.random() < 0.2 else rng.choice(_PLAIN)


def _pass(rng: random.Random) -> Any:
    name = rng.choice(_NAMES) if rng.random() < 0.2 else rng.choice(tuple(_PASSES))
    options: dict[Any, Any] = {}
    if name in _PASSES:
        for option in dataclasses.fields(_PASSES[name]):
            if option.init and rng.random() < 0.3:
                sane = rng.random() < 0.5 and option.default is not dataclasses.MISSING
                options[option.name] = option.default if sane else _value(rng)
    if rng.random() < 0.1:
        options[rng.choice(("x", "alpha", "", 3, None))] = _value(rng)
    return {name: options} if options or rng.random() < 0.5 else name


def _mapping(rng: random.Random) -> dict[Any, Any]:
    globs = {rng.choice(_GLOBS): rng.choice(_SCHEMES) for _ in range(rng.randrange(4))}
    data: dict[Any, Any] = {"schemes": globs}
    if rng.random() < 0.1:
        globs[rng.choice((1, None, (1, 2), "*"))] = _value(rng)
    if rng.random() < 0.8:
        data["passes"] = [_pass(rng) for _ in range(rng.randrange(5))]
    if rng.random() < 0.1:
        data["ascend"] = {rng.choice(("allow_float", "allow_inexact", "tokens", "x")): _value(rng)}
    for key in ("name", "description", "precision", "ascend", "schemes", "passes", "version", 7):
        if rng.random() < 0.05:
            data[key] = _value(rng)
    return data


def _damaged(rng: random.Random, text: bytes) -> bytes:
    """The text after one to five small accidents."""
    for _ in range(rng.randrange(1, 6)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        lines, words = text.split(b"\n"), text.split(b" ")
        rng.shuffle(lines)
        words[rng.randrange(len(words))] = rng.choice((*words, *_INSERTED))
        text = rng.choice((
            text[:at] + bytes([rng.randrange(256)]) + text[at + rng.randrange(2) :],
            text[:at] + text[at + rng.randrange(1, 20) :],
            text[:at] + rng.choice(_INSERTED) + text[at:],
            text[:at] + text[at : min(to, at + 300)] + text[at:],
            b"\n".join(lines),
            b" ".join(words),
        ))  # fmt: skip
    return text


def _prepare(folder: Path) -> Case:
    files = resources.files("panguq.builtin_recipes")
    presets = [(files / f"{name}.yaml").read_bytes() for name in preset_names()]
    written = folder / "recipe.yaml"

    def case(rng: random.Random) -> str:
        given: Any
        if rng.random() < 0.5:
            written.write_bytes(_damaged(rng, rng.choice(presets)))
            given = written
        else:
            given = _mapping(rng) if rng.random() < 0.95 else _value(rng)
        recipe = Recipe.of(given)
        written.write_text(recipe.to_yaml(), encoding="utf-8")
        again = Recipe.from_yaml(written)
        if again != recipe:
            raise Fault(f"reads {again!r:.80} back for {recipe!r:.80}")
        check_passes(recipe.build())
        return "accepted"

    return case


KIND = Kind("recipes", "recipes as damaged text and as odd Python values", _prepare, seconds=10)
