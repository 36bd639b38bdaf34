"""YAML as plain data: mappings, lists, text, finite numbers, booleans and null; nothing else.

Stricter than `yaml.safe_load`: a duplicate key, a tag and an alias are errors instead of surprises,
and `1e-3` is a number, as in YAML 1.2 and JSON.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from panguq.errors import RecipeError

MAX_BYTES = 64 * 1024
"""A recipe is a screen of text; what is far larger is some other file."""

MAX_DEPTH = 32
"""Lists and mappings within each other; a recipe has four."""

_QUOTE_GLOBS = 'a key or value that begins with *, & or ! needs quotes: "*": W8A8'


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, tags and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        refused = "alias" if isinstance(event, yaml.AliasEvent) else "tag"
        if refused == "alias" or getattr(event, "tag", None) is not None:
            problem = f"a YAML {refused} is refused"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {key.value!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would read as something else than text."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_yaml(path: Path) -> object:
    """The plain data in a file. Raises RecipeError, naming the file, for all that is not."""
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such file", "give the path of a .yaml file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: is larger than {MAX_BYTES} bytes", "this is not a recipe")
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes | str, source: str) -> object:
    """The plain data that the text spells; `source` names it in errors."""
    try:
        data = yaml.load(content, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        hint = _QUOTE_GLOBS if re.search("alias|anchor|tag", problem) else ""
        raise RecipeError(f"{where}: not valid YAML: {problem}", hint) from None
    except (yaml.YAMLError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise RecipeError(f"{source}: not valid YAML: {first_line}") from None
    except RecursionError:
        raise RecipeError(f"{source}: is nested too deeply", "this is not a recipe") from None
    check_plain(data, source)
    return data


def check_depth(value: object, source: str, depth: int = 0) -> None:
    """Raise RecipeError for lists and mappings that are nested deeper than any recipe's."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"{source}: is nested too deeply", "this is not a recipe")
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            check_depth(item, source, depth + 1)


def check_plain(value: object, source: str, key: str = "") -> None:
    """Raise RecipeError, naming the key, unless `value` is plain data."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                problem = f"the key {name!r:.80} is not text"
                raise RecipeError(f"{place_in(source, key)}: {problem}", f'write "{name!s:.80}"')
            check_plain(item, source, f"{key}.{name:.80}" if key else name[:80])
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            check_plain(item, source, f"{key}[{position}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{place_in(source, key)}: {value} is not a finite number")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise RecipeError(f"{place_in(source, key)}: the number has more than 63 bits")
    elif value is not None and not isinstance(value, str | int | float | bool):
        kind = type(value).__name__
        raise RecipeError(
            f"{place_in(source, key)}: {value!r:.80} is a {kind}",
            "use text, numbers, lists and mappings",
        )


def place_in(source: str, key: str) -> str:
    """`source: key`, or the source alone for the whole document."""
    return f"{source}: {key}" if key else source


def dump_yaml(data: object) -> str:
    """Plain data as text that `parse_yaml` reads back."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=96)
    return str(text)
