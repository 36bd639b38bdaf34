"""Imports point down one list of rooms, and no two modules import each other in a circle.

The list stands in docs/architecture.md too, for people; this test holds both to the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
AT_ROOT = ("ir", "passes", "lowering", "kernels")
ROOMS = (
    "panguq.cli panguq.__main__",
    "panguq.selftest",
    "panguq.pages",
    "panguq.accuracy_map",
    "panguq.tasks",
    "panguq",
    "panguq.compiler",
    "panguq.compile_data panguq.compile_key panguq.calibration",
    "panguq.planning",
    "panguq.explain",
    "panguq.forecast",
    "panguq.check",
    "panguq.compiled_model panguq.compiled_module panguq.compiled_encoder "
    "panguq.compiled_causal_lm panguq.generation panguq.frozen_module",
    "panguq.built",
    "panguq.formats",
    "panguq.dumps",
    "panguq.schedule",
    "panguq.report",
    "panguq.evaluation",
    "panguq.artifact",
    "panguq.serving_form",
    "panguq.recipe panguq.pass_options",
    "panguq.registry",
    "panguq.server_verdicts",
    "panguq.server_models",
    "panguq.servers",
    "panguq.server_releases",
    "panguq.lowering",
    "panguq.passes",
    "panguq.passes.codes panguq.passes.patterns panguq.passes.rotation panguq.passes.scaling "
    "panguq.passes.statistics panguq.passes.transforms",
    "panguq.passes.pipeline",
    "panguq.kernels",
    "panguq.tracing panguq.trace_check panguq.trace_difference panguq.equal_layers",
    "panguq.data",
    "panguq.models",
    "panguq.ir.analysis panguq.ir.run panguq.ir.text",
    "panguq.ir",
    "panguq.ir.ops",
    "panguq.ir.number_format",
    "panguq.tensors",
    "panguq.files",
    "panguq.builtin_recipes",
    "panguq.compile_report",
    "panguq.decibels panguq.extras panguq.versions panguq.suggest",
    "panguq.ranks",
    "panguq.errors",
)
"""From the top down. A module belongs to the longest name that it begins with."""


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder, package in [
        (ROOT / "src/panguq", "panguq"),
        *((ROOT / r, f"panguq.{r}") for r in AT_ROOT),
    ]:
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "panguq" and parts[0] in (*AT_ROOT, "builtin_recipes"):
                continue  # a link to a folder at the root
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(source: str, known: Mapping[str, object]) -> Iterator[str]:
    """The modules that a file imports, wherever in it, but for what only type checkers read."""
    tree = ast.parse(source)
    unread = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in known else node.module


def room_of(module: str) -> int:
    """The place in ROOMS of the room that a module belongs to."""
    name = module
    while name:
        for place, rooms in enumerate(ROOMS):
            if name in rooms.split() and (name != "panguq" or module == "panguq"):
                return place
        name = name.rpartition(".")[0]
    raise KeyError(f"{module} is in no room: add it to ROOMS and to docs/architecture.md")


def upward(graph: nx.DiGraph) -> list[str]:
    """The imports that point up the list."""
    return [f"{one} imports {other}" for one, other in graph.edges if room_of(other) < room_of(one)]


def circles(graph: nx.DiGraph) -> list[list[str]]:
    """Modules that import each other."""
    return [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    known = modules()
    edges = [(m, i) for m, path in known.items() for i in imports(path.read_text("utf-8"), known)]
    return nx.DiGraph((one, other) for one, other in edges if one != other)


def test_imports_point_down(graph: nx.DiGraph) -> None:
    assert upward(graph) == []


def test_there_is_no_circle(graph: nx.DiGraph) -> None:
    assert circles(graph) == []


def test_an_import_that_points_up_or_round_is_found() -> None:
    wrong = nx.DiGraph([("panguq.errors", "panguq.compiler"), ("panguq.compiler", "panguq.errors")])
    assert upward(wrong) == ["panguq.errors imports panguq.compiler"]
    assert circles(wrong) == [["panguq.compiler", "panguq.errors"]]


def test_an_import_within_a_function_counts_and_one_for_type_checkers_does_not() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from panguq.a import A\n"
        "def f():\n    from panguq import b\n"
    )
    known = {"panguq": 0, "panguq.a": 0, "panguq.b": 0}
    assert list(imports(source, known)) == ["panguq.b"]


def test_the_page_has_the_same_list() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    listed = page.split("<!-- rooms -->")[1].split("```")[1].strip().splitlines()[1:]
    assert [line.split("  ")[0].strip() for line in listed] == list(ROOMS)


def test_a_file_directly_in_passes_is_a_pass() -> None:
    for path in (ROOT / "passes").glob("*.py"):
        if path.name != "__init__.py":
            classes = [
                n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.ClassDef)
            ]
            assert any(
                "name" in ast.unparse(c) and "ClassVar[str]" in ast.unparse(c) for c in classes
            ), path
