"""`panguq passes` and `panguq recipes`: what there is to write a recipe with."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

from panguq.cli.command import Commands, add_command, add_json, print_json


def add(commands: Commands) -> None:
    """Add the commands to the command line."""
    passes = add_command(
        commands,
        "passes",
        run_passes,
        "List the passes with their options, defaults, and what each needs and establishes.",
        "panguq passes --json",
    )
    add_json(passes)
    recipes = add_command(
        commands,
        "recipes",
        run_recipes,
        "List the built-in recipes. With a name, print that recipe as a file to start from.",
        "panguq recipes w8a8 > mine.yaml",
    )
    recipes.add_argument("name", metavar="NAME", nargs="?", help="print this recipe")
    add_json(recipes)


def run_passes(options: argparse.Namespace) -> int:
    """Print the registry of passes."""
    rows = [describe_pass(cls) for cls in _registry()]
    if options.json:
        print_json(rows)
        return 0
    for row in rows:
        print(f"{row['name']}\n    {row['summary']}")
        for name, default in row["options"].items():
            print(f"    {name}: {default!r}")
        for key in ("requires", "establishes", "breaks"):
            if row[key]:
                print(f"    {key} {', '.join(row[key])}")
    return 0


def describe_pass(cls: Any) -> dict[str, Any]:
    """A pass's name, first sentence, options with defaults, and properties, as plain data."""
    from pydantic_core import to_jsonable_python

    fields = [field for field in dataclasses.fields(cls) if field.init]
    summary = (inspect.getmodule(cls).__doc__ or "").strip().split("\n")[0]
    before_after = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return {
        "name": cls.name,
        "summary": summary,
        "before_after": before_after,
        "options": {f.name: to_jsonable_python(f.default) for f in fields},
        "exact": cls.exact,
        "needs_calibration": cls.needs_calibration,
        **{
            key: sorted(p.name for p in getattr(cls, key))
            for key in ("requires", "establishes", "breaks")
        },
    }


def run_recipes(options: argparse.Namespace) -> int:
    """Print the built-in recipes, or one of them."""
    from panguq.recipe import Recipe, preset_names

    if options.name is not None:
        recipe = Recipe.named(options.name)
        if options.json:
            print_json(recipe.to_data())
        else:
            print(recipe.to_yaml(), end="")
        return 0
    recipes = [Recipe.named(name) for name in preset_names()]
    if options.json:
        print_json([recipe.to_data() for recipe in recipes])
        return 0
    for recipe in recipes:
        print(f"{recipe.name:14} {recipe.description.split('. ')[0].rstrip('.')}")
    return 0


def _registry() -> tuple[Any, ...]:
    from panguq.registry import all_passes

    return all_passes()
