"""Passes and their options as a recipe writes them: `name`, or `{name: {option: value}}`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from panguq import registry
from panguq.errors import RecipeError
from panguq.files.plain_yaml import check_plain
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import Pass
from panguq.suggest import did_you_mean, nearest

IMPLIED: tuple[type[Pass], ...] = (Canonicalize, AssignSchemes)
"""Every recipe begins with these; it does not list them."""


def passes_by_name() -> dict[str, type[Pass]]:
    """The passes that a recipe may list."""
    return {cls.name: cls for cls in registry.RECIPE_PASSES if cls not in IMPLIED}


def pass_from_entry(entry: object, where: str) -> Pass:
    """The pass that one item of `passes` stands for; `where` names the item in errors."""
    if isinstance(entry, Pass):
        _refuse_implied(entry.name, where)
        return entry
    if isinstance(entry, str):
        name, options = entry, None
    elif isinstance(entry, Mapping) and len(entry) == 1:
        name, options = next(iter(entry.items()))
    else:
        raise RecipeError(
            f"{where}: {entry!r:.80} is no pass", "write its name, or one {name: {option: value}}"
        )
    _refuse_implied(name, where)
    known = passes_by_name()
    if name not in known:
        hint = did_you_mean(str(name), known, "passes")
        raise RecipeError(f"{where}: unknown pass {name!r:.80}", hint)
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise RecipeError(
            f"{where} {name}: {options!r:.60} is not a mapping of options",
            f"write {name}: {{option: value}}",
        )
    return make_pass(known[name], options, f"{where} {name}")


def make_pass(cls: type[Pass], options: Mapping[str, Any], where: str) -> Pass:
    """An instance with these options, each checked against the annotation of its field."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    annotations = get_type_hints(cls, include_extras=True)
    values = {}
    for option, value in options.items():
        if option not in fields:
            hint = did_you_mean(str(option), fields, "options")
            raise RecipeError(f"{where}: unknown option {option!r:.80}", hint)
        values[option] = _check_option(fields[option], annotations[option], value, where)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # a required option is missing, or __post_init__
        raise RecipeError(f"{where}: {error}") from None
    except RecipeError as error:
        message = error.message.removeprefix(f"{cls.name}: ")
        raise RecipeError(f"{where}: {message}", error.hint) from None


def pass_to_entry(of: Pass) -> str | dict[str, dict[str, object]]:
    """The item of `passes` that makes this pass again, with every option."""
    fields = [field.name for field in dataclasses.fields(of) if field.init]
    options = {name: to_jsonable_python(getattr(of, name)) for name in fields}
    return {of.name: options} if options else of.name


def _check_option(
    field: dataclasses.Field[Any], annotation: Any, value: object, where: str
) -> object:
    """The value as the annotation has it: JSON's strict rules make a tuple or an enum out of
    plain data, but no number out of text."""
    check_plain(value, where, field.name)
    try:
        return TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        errors = error.errors()
        allowed = "; or ".join(e["msg"].replace("Input should", "it should") for e in errors)
        names = re.findall(r"'([^']+)'", str(errors[0].get("ctx", {}).get("expected", "")))
        near = nearest(value, names) if isinstance(value, str) else None
        hint = f"did you mean {near}? {allowed[0].upper()}{allowed[1:]}" if near else allowed
        if field.default is not dataclasses.MISSING:
            hint += f"; the default is {to_jsonable_python(field.default)!r}"
        raise RecipeError(f"{where}: option {field.name} is {value!r:.80}", hint) from None


def _refuse_implied(name: object, where: str) -> None:
    if name in {cls.name for cls in IMPLIED}:
        raise RecipeError(f"{where}: {name} runs in every recipe", "leave it out of `passes`")
