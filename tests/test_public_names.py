"""The manual lists the names that keep their meaning, and its examples import no others."""

from __future__ import annotations

import ast
import importlib
import re

import panguq
from tests.test_docs import DOCS, ROOT, examples

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(DOCS.rglob("*.md"))]


def listed(page: str) -> set[str]:
    """The names that a page of the reference describes: `::: panguq.check.report.check_folder`."""
    return set(re.findall(r"^::: (\S+)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE))


PUBLIC = listed("api.md") - {"panguq"} | {f"panguq.{name}" for name in panguq.__all__}
FOR_CONTRIBUTORS = PUBLIC | listed("contributing/reference.md")


def unlisted(source: str, names: set[str]) -> set[str]:
    """What this code takes from panguq that is neither in `names` nor in a module of them."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used |= {f"panguq.{node.attr}"} if node.value.id == "panguq" else set()
    ours = {name for name in used if name.startswith("panguq.")}
    return {name for name in ours if not {name, name.rpartition(".")[0]} & names}


def test_the_pages_import_public_names_alone() -> None:
    found: dict[str, set[str]] = {}
    for page in PAGES:
        names = FOR_CONTRIBUTORS if page.parent.name == "contributing" else PUBLIC
        strange = {name for text, _ in examples(page) for name in unlisted(text, names)}
        if strange:
            found[page.name] = strange
    assert found == {}, "list these names in docs/api.md, or use others"


def test_a_name_that_is_not_listed_is_found() -> None:
    code = "\n".join(
        [
            "import panguq, panguq.models.hf",
            "from panguq import compile",
            "from panguq.passes.pipeline.base import Pass, labels",
            "from panguq.ir.edit import call",
            "panguq.load('x')",
            "panguq.secret()",
        ]
    )
    names = {"panguq.compile", "panguq.load", "panguq.passes.pipeline.base.Pass", "panguq.ir.edit"}
    assert unlisted(code, names) == {
        "panguq.models.hf",
        "panguq.secret",
        "panguq.passes.pipeline.base.labels",
    }


def test_every_listed_name_exists() -> None:
    for name in sorted(FOR_CONTRIBUTORS):
        module, _, leaf = name.rpartition(".")
        if not hasattr(importlib.import_module(module), leaf):
            importlib.import_module(name)


def test_every_page_is_in_the_manual() -> None:
    """mkdocs.yml names each page; `make docs` fails on a link that leads nowhere."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")} == set(
        re.findall(r"(\S+\.md)", menu.partition("\nnav:")[2])
    )
