"""`panguq passes` and `panguq recipes`: what there is to write a recipe with."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Sequence
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
        "List the built-in recipes by what they are for, with the measured loss of each. With a "
        "name, print that recipe as a file to start from.",
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
        print_json([recipe.to_data() | _measured(recipe) for recipe in recipes])
    else:
        print(_by_use(recipes))
    return 0


def _by_use(recipes: Sequence[Any]) -> str:
    """A paragraph a use: name, perplexity above the float model's, KL, and the first sentence."""
    groups: dict[str, list[str]] = {use: [] for use in _USES.values()}
    model = ""
    for recipe in recipes:
        found = _measured(recipe)
        loss = ("", "")
        if found["perplexity_percent"] is not None:
            model = found["measured_on"]
            loss = (_above(found["perplexity_percent"]), f"{found['kl']:.3f}")
        words = recipe.description.split(". ")[0].rstrip(".")
        line = f"  {recipe.name:21} {loss[0]:>9} {loss[1]:>6}  {words}"
        groups[found["use"]].append(line)
    paragraphs = ["\n".join((use, *lines)) for use, lines in groups.items() if lines]
    said = (
        f"Behind a name: perplexity above the float model's, and KL divergence, of {model} "
        "(docs/accuracy.md). Larger models lose less. Nothing there: not measured."
    )
    return "\n\n".join([*paragraphs, said])


def _above(percent: float) -> str:
    return f"{percent:+.1f} %" if percent < 1000 else f"{1 + percent / 100:.0f} times"


def _measured(recipe: Any) -> dict[str, Any]:
    """What a recipe is for, and its loss on the first yardstick, None where nobody measured it."""
    from panguq.planning.losses import losses

    found = losses().get(recipe.name, ())
    return {
        "use": _use(recipe),
        "measured_on": found[0].model if found else None,
        "perplexity_percent": found[0].perplexity_percent if found else None,
        "kl": found[0].kl if found else None,
    }


_USES = {
    "float": "Nothing quantized",
    "8-8": "8-bit weights and activations: long prompts, large batches, NPU servers",
    "4-8": "4-bit weights, 8-bit activations: the same, in less memory",
    "4-4": "4-bit weights and activations: the smallest integer matmuls, far from float",
    "8-16": "6- and 8-bit weights alone: less memory at next to no loss",
    "4-16": "4-bit weights alone: decoding of few sequences, a quarter of the memory",
    "2-16": "Weights below 4 bits alone: where memory rules",
}


def _use(recipe: Any) -> str:
    from panguq.ir.quant_spec import parse_scheme

    scheme = parse_scheme(recipe.schemes["*"])
    if scheme.weight is None:
        return _USES["float"]
    if scheme.activation is not None:
        weight = 8 if scheme.weight.bits > 4 else 4
        return _USES[f"{weight}-{8 if scheme.activation.bits > 4 else 4}"]
    return _USES[
        "8-16" if scheme.weight.bits > 4 else "4-16" if scheme.weight.bits == 4 else "2-16"
    ]


def _registry() -> tuple[Any, ...]:
    from panguq.registry import all_passes

    return all_passes()
