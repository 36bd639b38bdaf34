"""Recipes: what they build, that they round-trip, and one clear error for each wrong one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field

from panguq import registry
from panguq.errors import RecipeError
from panguq.files.plain_yaml import MAX_BYTES, parse_yaml
from panguq.pass_options import make_pass, pass_to_entry
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.canonicalize import Canonicalize
from panguq.passes.pipeline.base import Pass
from panguq.recipe import Recipe, preset_names
from panguq.schedule import check_passes
from panguq.suggest import did_you_mean, nearest

PRESETS = (
    "float", "mixed-4.75", "w1-billm", "w2a16", "w2a16-gptq", "w2a16-slim-llm", "w3a16",
    "w3a16-awq", "w3a16-gptq", "w3a16-slim-llm", "w3a16-tuned", "w4a16", "w4a16-asym", "w4a16-awq",
    "w4a16-gptaq", "w4a16-gptq", "w4a16-rounding", "w4a16-tuned", "w4a4-flat", "w4a4-rotate",
    "w4a8", "w4a8-gptq", "w4a8-tuned", "w6a16", "w8a16", "w8a8", "w8a8-dynamic",
    "w8a8-dynamic-kv8", "w8a8-dynamic-serving", "w8a8-dynamic-tuned", "w8a8-fp8", "w8a8-serving",
    "w8a8-smooth", "w8a8-tuned",
)  # fmt: skip


@dataclass(frozen=True)
class Smooth(Pass):
    """A pass that does nothing, with an option of every kind."""

    name: ClassVar[str] = "test-smooth"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    sites: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class Plain(Pass):
    """A pass without options."""

    name: ClassVar[str] = "test-plain"


@dataclass(frozen=True)
class Fussy(Pass):
    """A pass with a required option and a check of its own."""

    name: ClassVar[str] = "test-fussy"
    step: int

    def __post_init__(self) -> None:
        if self.step == 0:
            raise ValueError("step must not be 0")


@pytest.fixture(autouse=True)
def more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    extended = (*registry.RECIPE_PASSES, Smooth, Plain, Fussy)
    monkeypatch.setattr(registry, "RECIPE_PASSES", extended)


def with_passes(*passes: Any) -> Recipe:
    return Recipe.of({"schemes": {"*": "W8A8"}, "passes": list(passes)})


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def fails(make: Any, *words: str) -> None:
    """`make` raises a RecipeError with these words in its message or hint."""
    with pytest.raises(RecipeError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


# What a recipe builds


def test_passes_follow_canonicalize_and_assign_schemes() -> None:
    built = with_passes({"test-smooth": {"alpha": 0.25, "sites": ["norm"]}}, "test-plain").build()
    assert built == (
        Canonicalize(),
        AssignSchemes(schemes=(("*", "W8A8"),)),
        Smooth(alpha=0.25, sites=("norm",)),
        Plain(),
    )


def test_the_head_has_a_scheme_of_its_own() -> None:
    recipe = Recipe.of({"schemes": {"*": "W4A16"}, "head": "w8a16"})
    assign = recipe.build()[1]
    assert assign == AssignSchemes(schemes=(("*", "W4A16"),), head="W8A16")
    assert assign.scheme_for("lm_head", lambda: True)[0].name == "W8A16"
    assert assign.scheme_for("mlp.up_proj", lambda: False)[0].name == "W4A16"
    named = recipe.with_schemes({"lm_head": "FLOAT"}).build()[1]
    assert named.scheme_for("lm_head", lambda: True)[0].name == "FLOAT"
    assert Recipe.of(parse_yaml(recipe.to_yaml().encode(), "recipe")) == recipe
    fails(lambda: Recipe.of({"schemes": {"*": "W8A8"}, "head": "W9"}), "recipe: head: ", "W9")
    fails(lambda: Recipe.of({"schemes": {"*": "W8A8"}, "head": 8}), "recipe: head = 8")


def test_a_file_without_a_name_is_called_as_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'schemes: {"*": w8a16}\npasses:\n')
    recipe = Recipe.from_yaml(path)
    assert (recipe.name, recipe.schemes, recipe.passes) == ("mine", {"*": "W8A16"}, ())
    assert Recipe.of(str(path)) == Recipe.of(path) == recipe
    assert Recipe.of(recipe) is recipe


def test_passes_may_be_instances() -> None:
    recipe = Recipe(schemes={"*": "W8A8"}, passes=(Smooth(alpha=0.1), Plain()))
    assert recipe.build()[2:] == (Smooth(alpha=0.1), Plain())


def test_the_default_scheme_never_hides_a_glob() -> None:
    recipe = Recipe.of({"schemes": {"*.down_proj": "W8A16", "*": "W8A8"}})
    assert list(recipe.schemes) == ["*", "*.down_proj"]


def test_with_schemes_is_a_copy_whose_globs_win() -> None:
    recipe = Recipe.of({"schemes": {"*": "W8A8", "a.*": "W8A16", "b.*": "FLOAT"}})
    changed = recipe.with_schemes({"a.*": "w4a16-g64", "*": "W8A8_DYNAMIC"})
    assert list(changed.schemes.items()) == [
        ("*", "W8A8_DYNAMIC"),
        ("b.*", "FLOAT"),
        ("a.*", "W4A16-g64"),
    ]
    assert recipe.schemes["*"] == "W8A8"
    fails(lambda: recipe.with_schemes({"a.*": "W8A9"}), "recipe unnamed", "did you mean W8A8")


def test_yaml_round_trips(tmp_path: Path) -> None:
    recipe = Recipe(
        name="mine",
        description="two lines:\nand 'quotes' # no comment, 1e-3",
        schemes={"*": "W4A16-g64", "*.down_proj": "W8A16"},
        passes=(Smooth(alpha=1e-5, observer="mse", sites=("1e-3", "null", "*")), Plain(), Fussy(2)),
    )
    text = recipe.to_yaml()
    assert Recipe.from_yaml(write(tmp_path, text)) == recipe
    assert "limit: null" in text  # defaults are written out


def test_an_exponent_is_a_number(tmp_path: Path) -> None:
    text = 'schemes: {"*": W8A8}\npasses: [{test-smooth: {alpha: 1e-3}}]'
    assert Recipe.from_yaml(write(tmp_path, text)).passes == (Smooth(alpha=0.001),)


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        with_passes().name = "other"  # type: ignore[misc]


# Presets


def test_the_presets_are_these() -> None:
    assert preset_names() == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_describes_itself_and_round_trips(name: str, tmp_path: Path) -> None:
    recipe = Recipe.of(name)
    assert recipe.name == name
    assert len(recipe.description) > 80
    assert Recipe.from_yaml(write(tmp_path, recipe.to_yaml())) == recipe
    assert recipe.build()[0] == Canonicalize()
    check_passes(recipe.build())


def test_float_quantizes_nothing() -> None:
    assert Recipe.named("float").schemes == {"*": "FLOAT"}
    assert Recipe.named("float").passes == ()


@pytest.mark.parametrize("cls", registry.RECIPE_PASSES, ids=lambda cls: cls.name)
def test_every_registered_pass_has_options_that_a_recipe_can_write(cls: type[Pass]) -> None:
    default = cls()
    entry = pass_to_entry(default)
    options = entry[cls.name] if isinstance(entry, dict) else {}
    assert make_pass(cls, options, "here") == default


# Wrong names


def test_an_unknown_preset() -> None:
    fails(lambda: Recipe.of("w8a8_dynamc"), "'w8a8_dynamc'", "did you mean w8a8-dynamic?", "w4a16,")
    fails(lambda: Recipe.of("W8A8"), "did you mean w8a8?")
    fails(lambda: Recipe.of("zzz"), "'zzz'", "The presets are float, mixed-4.75")
    fails(lambda: Recipe.of(3), "a int is no recipe", "preset")  # type: ignore[arg-type]


def test_an_unknown_pass() -> None:
    fails(lambda: with_passes("test_smoth"), "passes[0]: unknown", "did you mean test-smooth?")
    fails(lambda: with_passes("canonicalize"), "canonicalize runs in every recipe", "leave it out")
    fails(lambda: with_passes(Canonicalize()), "canonicalize runs in every recipe")


def test_an_unknown_option(tmp_path: Path) -> None:
    text = 'schemes: {"*": W8A8}\npasses: [test-plain, {test-smooth: {alhpa: 0.5}}]'
    path = write(tmp_path, text)
    words = "mine.yaml: passes[1] test-smooth: unknown option 'alhpa'", "did you mean alpha?"
    fails(lambda: Recipe.from_yaml(path), *words)
    fails(lambda: with_passes({"test-plain": {"x": 1}}), "'x'", "there are no options")


def test_an_unknown_key_or_scheme() -> None:
    fails(
        lambda: Recipe.of({"scheme": {"*": "W8A8"}, "schemes": {"*": "W8A8"}}),
        "unknown key 'scheme'",
        "did you mean schemes?",
    )
    fails(lambda: Recipe.of({"name": "x"}), "the key 'schemes' is missing", "write")
    fails(lambda: Recipe.of({"schemes": {"*": "W8A9"}}), "schemes['*']", "did you mean W8A8")


# Wrong values


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": "0.5"}, ("alpha is '0.5'", "a valid number", "the default is 0.5")),
        ({"alpha": True}, ("alpha is True", "a valid number")),
        ({"alpha": 1.5}, ("alpha is 1.5", "less than or equal to 1")),
        ({"alpha": float("nan")}, ("alpha: nan is not a finite number",)),
        ({"alpha": b"x"}, ("alpha: b'x' is a bytes",)),
        ({"observer": "minmx"}, ("'minmx'", "did you mean minmax?", "'percentile' or 'mse'")),
        ({"observer": 3}, ("observer is 3", "'percentile' or 'mse'")),
        ({"sites": "norm"}, ("sites is 'norm'", "valid")),
        ({"sites": [1]}, ("sites is [1]", "valid string")),
        ({"limit": 2.0}, ("limit is 2.0", "valid integer", "the default is None")),
        ({"limit": 2**70}, ("limit", "63 bits")),
        ([1], ("[1] is not a mapping of options", "write test-smooth: {option: value}")),
    ],
)
def test_a_wrong_option_value(options: Any, words: tuple[str, ...]) -> None:
    fails(lambda: with_passes({"test-smooth": options}), "passes[0] test-smooth", *words)


def test_a_pass_that_refuses_its_options() -> None:
    fails(lambda: with_passes("test-fussy"), "passes[0] test-fussy", "step")
    fails(lambda: with_passes({"test-fussy": {"step": 0}}), "step must not be 0")


@pytest.mark.parametrize("entry", [3, None, [], {}, {"a": {}, "b": {}}])
def test_an_item_that_is_no_pass(entry: Any) -> None:
    fails(lambda: with_passes(entry), "passes[0]", "is no pass")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "two words"}, ("name = 'two words'",)),
        ({"name": 3}, ("name = 3", "valid string")),
        ({"description": None}, ("description = None",)),
        ({"schemes": []}, ("schemes = []", "valid dictionary")),
        ({"schemes": {}}, ("schemes = {}", "at least 1")),
        ({"schemes": {"*": 8}}, ("schemes['*'] = 8", "a scheme's name")),
        ({"schemes": {" ": "W8A8"}}, ("schemes[' ']", "write a glob")),
        ({"passes": "smoothquant"}, ("passes = 'smoothquant'", "valid tuple")),
        ({7: 1}, ("7",)),
    ],
)
def test_a_wrong_value_of_a_key(change: dict[Any, Any], words: tuple[str, ...]) -> None:
    fails(lambda: Recipe.of({"schemes": {"*": "W8A8"}} | change), "recipe: ", *words)


def test_the_constructor_gives_the_same_errors() -> None:
    fails(lambda: Recipe(schemes={"*": "W8A8"}, pases=()), "did you mean passes?")  # type: ignore


# Wrong files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("is empty",)),
        ("# nothing\n", ("is empty",)),
        ("- a\n", ("is a list, not a mapping",)),
        ("w8a8", ("the value 'w8a8', not a mapping",)),
        ("name: [a", ("line 1: not valid YAML",)),
        ("schemes:\n  *: W8A8\n", ("line 2: not valid YAML", "needs quotes")),
        ("schemes:\n  *head: W8A8\n", ("line 2", "a YAML alias is refused", "needs quotes")),
        ("name: !!python/object:os.system {}", ("a YAML tag is refused",)),
        ("name: a\nname: b\n", ("line 2", "'name' is there twice")),
        ("schemes:\n  \"*\": W8A8\n  '*': FLOAT\n", ("line 3", "'*' is there twice")),
        ("a: 1\n---\nb: 2\n", ("not valid YAML", "single document")),
        ("name: .nan", ("name: nan is not a finite number",)),
        ("name: [.inf]", ("name[0]: inf is not a finite number",)),
        ("name: 2020-02-02", ("name: ", "is a date")),
        ("name: 2020-99-99", ("not valid YAML",)),
        ("name: " + "9" * 5000, ("mine.yaml",)),
        ("1: x", ("the key 1 is not text",)),
        ("[" * 5000, ("nested too deeply",)),
        ("#" * (MAX_BYTES + 1), ("larger than",)),
        (b"name: \xff\xfe", ("not valid YAML",)),
        (b"\x00\x00", ("not valid YAML",)),
    ],
    ids=range(21),
)
def test_a_wrong_file(tmp_path: Path, text: str | bytes, words: tuple[str, ...]) -> None:
    fails(lambda: Recipe.from_yaml(write(tmp_path, text)), "mine.yaml", *words)


def test_a_missing_file(tmp_path: Path) -> None:
    fails(lambda: Recipe.of("missing.yaml"), "missing.yaml: there is no such file")
    fails(lambda: Recipe.from_yaml(tmp_path), "there is no such file")


def test_values_that_no_file_holds() -> None:
    round_and_round: list[Any] = []
    round_and_round.append(round_and_round)
    fails(lambda: Recipe.of({"schemes": round_and_round}), "nested too deeply")
    fails(lambda: Recipe.of(round_and_round), "a list is no recipe")  # type: ignore[arg-type]
    fails(
        lambda: Recipe.of({"schemes": {"*": "W8A8"}, "ascend": {"tokens": object()}}),
        "recipe: ascend: tokens",
        "is a object",
    )
    fails(lambda: Recipe.of("a" * 9999), "unknown recipe 'aaa")


# Did you mean


def test_nearest_ignores_case_and_joiners() -> None:
    assert nearest("SMOOTH_QUANT", ["smooth-quant", "calibrate"]) == "smooth-quant"
    assert nearest("xyz", ["smooth-quant", "calibrate"]) is None
    assert nearest("", []) is None


def test_did_you_mean_lists_the_names() -> None:
    assert did_you_mean("a", ["b", "c"], "letters") == "The letters are b, c"
    assert did_you_mean("x", [], "letters") == "there are no letters"


def test_a_value_of_pages_is_not_repeated_whole() -> None:
    entry = {"smoothquant": {"sites": ["x" * 5000]}}
    with pytest.raises(RecipeError, match="unknown kind of site") as caught:
        Recipe.of({"schemes": {"*": "W8A8"}, "passes": [entry]})
    assert len(str(caught.value)) < 1000
    with pytest.raises(RecipeError, match="unknown option") as caught:
        Recipe.of({"schemes": {"*": "W8A8-" + "9" * 5000}, "passes": []})
    assert len(str(caught.value)) < 2000
