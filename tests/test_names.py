"""One public name, one meaning: no class, function or type is defined in two modules."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("src/panguq", "ir", "passes", "lowering", "kernels")
DELIBERATE = {
    "Floats": "a numpy array of float64",
    "Size": "a size, which may be symbolic",
    "Tile": "the three sizes of a tile",
    "add": "adds a command to the command line",
    "check_linears": "what each checkpoint format refuses",
    "check_place": "where each format would not write",
    "dynamic_quant": "an op and its Triton kernel",
    "latent_attention": "the op of every graph and an NPU's",
    "quantized": "the quantized linears of a folder in each format",
    "reference": "what each kernel is compared with",
    "refusal": "why an op cannot do a matmul",
    "render": "an explanation as text",
    "run": "runs a command, or a graph",
}


def defined_in(source: str) -> set[str]:
    """The public classes, functions and type aliases (`Name = …`) of a module."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            found |= {name for name in names if name[0].isupper() and not name.isupper()}
    return {name for name in found if not name.startswith("_")}


def defined_twice(sources: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The names that several modules define, with the modules; sources: (module, its text)."""
    places: dict[str, list[str]] = defaultdict(list)
    for module, source in sources:
        for name in defined_in(source):
            places[name].append(module)
    return {name: modules for name, modules in places.items() if len(modules) > 1}


def test_a_public_name_has_one_meaning() -> None:
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    twice = defined_twice((str(f.relative_to(ROOT)), f.read_text("utf-8")) for f in files)
    strange = {name: places for name, places in twice.items() if name not in DELIBERATE}
    assert strange == {}, "give one of them another name, or say in DELIBERATE what both mean"
    assert set(DELIBERATE) <= set(twice), "these are defined once by now: take them out"


def test_a_name_with_two_meanings_is_found() -> None:
    one = "class Group: ...\ndef _packed(): ...\nGROUP = 1\ndef at(): ..."
    other = "Group = tuple[int, ...]\ndef _packed(): ...\nGROUP = 2\nclass Other:\n  def at(): ..."
    assert defined_twice([("a", one), ("b", other)]) == {"Group": ["a", "b"]}
