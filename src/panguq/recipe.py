"""A recipe says how a model is quantized: which scheme for which matmul, and which passes in order.

```yaml
name: w8a8
description: what it is good for and what it costs
schemes:                    # glob over module paths -> scheme; the last match wins
  "*": W8A8                 # the default, wherever it stands
  "*.down_proj": W8A8_DYNAMIC
head: W8A16                 # the matmul that gives the logits; FLOAT unless it is said
passes:                     # after canonicalize and assign-schemes, in this order
  - smoothquant: {alpha: 0.5}
  - insert-fake-quant
```
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeAlias, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import to_jsonable_python

from panguq.errors import LoweringError, RecipeError
from panguq.files.plain_yaml import (
    check_depth,
    check_plain,
    dump_yaml,
    parse_yaml,
    place_in,
    read_yaml,
)
from panguq.ir.quant_spec import parse_scheme
from panguq.lowering.options import AscendOptions
from panguq.lowering.problem import Precision
from panguq.pass_options import pass_from_entry, pass_to_entry
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import Pass
from panguq.passes.pipeline.module_globs import AllowUnmatched
from panguq.suggest import did_you_mean

RecipeLike: TypeAlias = Union["Recipe", str, Path, Mapping[str, Any]]
"""What `Recipe.of` takes: a recipe, a preset's name, the path of a YAML file, or a mapping."""


def preset_names() -> tuple[str, ...]:
    """The built-in recipes, by name."""
    files = resources.files("panguq.builtin_recipes").iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def _source(info: ValidationInfo) -> str:
    return str(info.context) if info.context else "recipe"


def _check_schemes(schemes: object, info: ValidationInfo) -> object:
    """Every name in the spelling of `parse_scheme`; the default first, so that the rest wins."""
    if not isinstance(schemes, Mapping):
        return schemes
    checked = {}
    for glob, name in sorted(schemes.items(), key=lambda item: item[0] != "*"):
        where = place_in(_source(info), f"schemes[{glob!r:.80}]")
        if not isinstance(glob, str) or not glob.strip() or not isinstance(name, str):
            raise RecipeError(
                f"{where} = {name!r:.80}", "write a glob and a scheme's name: '*': W8A8"
            )
        try:
            checked[glob] = parse_scheme(name).name
        except RecipeError as error:
            raise RecipeError(f"{where}: {error.message}", error.hint) from None
    return checked


def _check_head(name: object, info: ValidationInfo) -> object:
    """The scheme of the head in the spelling of `parse_scheme`."""
    where = place_in(_source(info), "head")
    if not isinstance(name, str):
        raise RecipeError(f"{where} = {name!r:.80}", "write a scheme's name: W8A16")
    try:
        return parse_scheme(name).name
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", error.hint) from None


def _build_passes(entries: object, info: ValidationInfo) -> object:
    if entries is None:  # an empty `passes:` in a file
        return ()
    if not isinstance(entries, list | tuple):
        return entries
    source = _source(info)
    return tuple(pass_from_entry(e, f"{source}: passes[{i}]") for i, e in enumerate(entries))


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _ascend_options(value: object, info: ValidationInfo) -> object:
    """The options that a mapping spells; unknown names and values are refused by name."""
    if not isinstance(value, Mapping):
        return value
    where = place_in(_source(info), "ascend")
    check_plain(value, where)
    known = [field.name for field in dataclasses.fields(AscendOptions)]
    for key in value:
        if key not in known:
            raise RecipeError(
                f"{where}: unknown option {key!r:.80}", did_you_mean(str(key), known, "options")
            )
    try:
        return TypeAdapter(AscendOptions).validate_json(json.dumps(dict(value)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{where}: {option} = {first['input']!r:.60}", first["msg"]) from None
    except LoweringError as error:
        raise RecipeError(f"{where}: {error.message}", error.hint) from None


class Recipe(BaseModel):
    """Schemes by module glob and passes in order. In Python, `passes` may hold Pass instances.

    `head` is the scheme of the matmul that gives the logits, unless a glob other than `*` names it.
    `precision` is what a float32 model may multiply in on a CPU: `float32` keeps every product
    exact; otherwise weight-only matmuls may be rounded to bfloat16, and float matmuls and attention
    are with `bfloat16`, or with `auto` where that is faster on the machine. `ascend` holds the
    options of Ascend targets. A glob that matches no matmul of a model is an error there, unless
    `allow_unmatched` is true or lists it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(default="unnamed", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")
    description: str = ""
    schemes: Annotated[dict[str, str], BeforeValidator(_check_schemes)] = Field(min_length=1)
    head: Annotated[str, BeforeValidator(_check_head)] = "FLOAT"
    passes: Annotated[tuple[InstanceOf[Pass], ...], BeforeValidator(_build_passes)] = ()
    precision: Precision = "auto"
    ascend: Annotated[AscendOptions, BeforeValidator(_ascend_options)] = AscendOptions()
    allow_unmatched: Annotated[AllowUnmatched, BeforeValidator(_as_tuple)] = False

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """The recipe in a file. Without `name` it is called as the file."""
        path = Path(path)
        name = re.sub(r"[^A-Za-z0-9_.+-]", "-", path.stem)
        return cls._from_data(read_yaml(path), str(path), name)

    @classmethod
    def named(cls, name: str) -> Recipe:
        """A built-in recipe. It is for all models, so its own globs may match nothing in some."""
        if name not in preset_names():
            hint = did_you_mean(name, preset_names(), "presets")
            raise RecipeError(f"unknown recipe {name!r:.80}", f"{hint}; a path must end in .yaml")
        file = resources.files("panguq.builtin_recipes") / f"{name}.yaml"
        recipe = cls._from_data(parse_yaml(file.read_bytes(), file.name), file.name, name)
        own = tuple(glob for step in recipe.build() for glob in step.globs if glob != "*")
        return recipe.model_copy(update={"allow_unmatched": own}) if own else recipe

    @classmethod
    def of(cls, recipe: RecipeLike, *, allow_unmatched: bool = False) -> Recipe:
        """The recipe that a preset's name, a path, a mapping or a recipe stands for.

        `allow_unmatched` lets each of its globs match nothing.
        """
        if allow_unmatched:
            return cls.of(recipe).model_copy(update={"allow_unmatched": True})
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            check_depth(recipe, "recipe")
            return cls._from_data(dict(recipe), "recipe")
        if isinstance(recipe, str) and not recipe.endswith((".yaml", ".yml")):
            return cls.named(recipe)
        if isinstance(recipe, str | Path):
            return cls.from_yaml(recipe)
        raise RecipeError(
            f"a {type(recipe).__name__} is no recipe",
            "give a preset's name, the path of a .yaml file, a mapping or a Recipe",
        )

    @classmethod
    def _from_data(cls, data: object, source: str, name: str = "unnamed") -> Recipe:
        if data is None:
            raise RecipeError(f"{source}: is empty", "a recipe has at least `schemes`")
        if not isinstance(data, dict):
            kind = "a list" if isinstance(data, list) else f"the value {data!r:.60}"
            raise RecipeError(
                f"{source}: is {kind}, not a mapping", "write `name:`, `schemes:`, `passes:`"
            )
        return cls.model_validate({"name": name} | data, context=source)

    @model_validator(mode="wrap")
    @classmethod
    def _raise_recipe_error(
        cls, data: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Recipe:
        """Answer the first thing that is wrong as a RecipeError instead of pydantic's list."""
        try:
            recipe: Recipe = validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                hint = did_you_mean(key, cls.model_fields, "keys")
                raise RecipeError(f"{_source(info)}: unknown key {key!r:.80}", hint) from None
            if first["type"] == "missing":
                message = f"{_source(info)}: the key {key!r} is missing"
                raise RecipeError(message, 'at least write `schemes: {"*": W8A8}`') from None
            given = f"{first['input']!r:.60}"
            raise RecipeError(f"{_source(info)}: {key} = {given}", first["msg"]) from None
        return recipe

    def implied(self) -> tuple[Pass, ...]:
        """The two passes that every compile starts with."""
        return (Canonicalize(), AssignSchemes(tuple(self.schemes.items()), self.head))

    def build(self) -> tuple[Pass, ...]:
        """All passes in order, with the two that every compile starts with."""
        return (*self.implied(), *self.passes)

    def with_schemes(self, schemes: Mapping[str, str]) -> Recipe:
        """A copy in which these globs come last and so win; "*" replaces the default.

        Each is to match a matmul, unless all globs may match nothing.
        """
        kept = {glob: name for glob, name in self.schemes.items() if glob not in schemes}
        fields = dict(self) | {"schemes": kept | dict(schemes)}
        if isinstance(self.allow_unmatched, tuple):
            fields["allow_unmatched"] = tuple(g for g in self.allow_unmatched if g not in schemes)
        return type(self).model_validate(fields, context=f"recipe {self.name}")

    def to_data(self) -> dict[str, Any]:
        """The recipe as plain data, with every option of every pass."""
        passes = [pass_to_entry(step) for step in self.passes]
        others = to_jsonable_python({"ascend": self.ascend, "allow": self.allow_unmatched})
        return {
            **dict(self),
            "passes": passes,
            "ascend": others["ascend"],
            "allow_unmatched": others["allow"],
        }

    def to_yaml(self) -> str:
        """The recipe as a file, with every option of every pass, so that it keeps its meaning
        when a default changes. A pass that is not in the registry is written by name, too, but
        reading the file back needs it there."""
        return dump_yaml(self.to_data())
