"""The files that a contributor's tools read say what they should."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_hooks_are_the_programs_of_make_lint() -> None:
    """Local, so that nothing is fetched and the release is that of `make lint`."""
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert repo["repo"] == "local"
    programs = {tuple(hook["entry"].split()[:2]) for hook in repo["hooks"]}
    assert {name.removeprefix(".venv/bin/") for name, *_ in programs} == {"ruff", "mypy"}
    for hook in repo["hooks"]:
        assert hook["language"] == "system"
        assert hook["id"].startswith(Path(hook["entry"].split()[0]).name)


@pytest.mark.parametrize("form", FORMS, ids=lambda p: p.stem)
def test_issue_forms_are_whole(form: Path) -> None:
    content = yaml.safe_load(form.read_text("utf-8"))
    if form.stem == "config":
        assert content["blank_issues_enabled"] is True
        return
    assert content["name"] and content["description"]
    for field in content["body"]:
        assert field["type"] in ("markdown", "textarea", "input")
        assert field["attributes"].get("label") or field["attributes"].get("value")


def test_the_licence_is_the_one_that_the_package_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert project["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in text
    assert "9. Accepting Warranty" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_manual_makes_lists_of_arguments() -> None:
    """And of nothing else: one line with a colon is prose."""
    pytest.importorskip("griffe")
    code = (
        "from argument_lists import as_list\n"
        "print(as_list('Run.\\n\\nmodel: one\\n    more\\nseed: two'))\n"
        "print(as_list('Note: one'))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True, check=True
    ).stdout
    assert said == "Run.\n\n- `model`: one\n    more\n- `seed`: two\nNote: one\n"
