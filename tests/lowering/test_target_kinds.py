"""A target answers for itself: nothing outside its folder asks of which kind it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from panguq.lowering.targets import known_targets

ROOT = Path(__file__).parents[2]
FOLDERS = ("lowering", "passes", "ir", "kernels", "src/panguq")


CLASSES = ("CpuTarget", "AscendTarget", "AscendMachine")


def comparisons(source: str, kinds: set[str]) -> list[str]:
    """Where a source compares something's `kind` with a kind of target, or asks for a class."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node)
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            named = {c.value for p in parts for c in ast.walk(p) if isinstance(c, ast.Constant)}
            asks = any(isinstance(p, ast.Attribute) and p.attr == "kind" for p in parts)
            asks = asks and bool(named & kinds)
        else:
            asks = isinstance(node, ast.Call) and text.startswith("isinstance(")
            asks = asks and any(name in text for name in CLASSES)
        if asks:
            found.append(text)
    return found


def test_no_code_outside_a_targets_folder_asks_for_its_kind() -> None:
    kinds = {target.kind for target in known_targets()}
    found = {}
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        within = path.relative_to(ROOT).parts
        if within[:2] in {("lowering", kind) for kind in kinds}:
            continue
        if asked := comparisons(path.read_text("utf-8"), kinds):
            found["/".join(within)] = asked
    assert found == {}


@pytest.mark.parametrize(
    "line",
    ['if target.kind == "ascend": pass', 'x = find_target(t).kind in ("cpu",)',
     "isinstance(target, AscendTarget)"],
)  # fmt: skip
def test_such_a_question_is_found(line) -> None:
    assert comparisons(line, {"cpu", "ascend"})
