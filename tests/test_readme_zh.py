"""README.zh-CN.md says what README.md says: the same commands, code, figures and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def code_lines(text: str) -> list[str]:
    """Every line of every code block, without its comment, which each language writes itself."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = (
        re.sub(r"\s+#\s.*", "", line).strip() for block in blocks for line in block.split("\n")
    )
    return [line for line in lines if line]


def code_spans(text: str) -> list[str]:
    """Inline code, once each: commands, recipes, options."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return list(dict.fromkeys(" ".join(s.split()) for s in re.findall(r"`([^`]+)`", prose)))


def figures(text: str) -> list[str]:
    """Every cell of a table with a figure or a name in it, in order, without its words."""
    cells = (cell for line in text.split("\n") if line.startswith("|") for cell in line.split("|"))
    kept = (" ".join(re.findall(r"`[^`]+`|[-+]?\d+(?:[.,]\d+)*", cell)) for cell in cells)
    return [cell for cell in kept if cell]


def links(text: str) -> list[str]:
    """Where the links lead, in order; anchors are the language's own."""
    found = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text)
    return [link for link in found if not link.startswith(("#", "README"))]


KINDS = {"code": code_lines, "inline code": code_spans, "figures": figures, "links": links}


def missing(kind: str, english: str, chinese: str) -> str:
    """What one page has and the other lacks, in words; empty if nothing."""
    of_english, of_chinese = KINDS[kind](english), KINDS[kind](chinese)
    absent = [line for line in of_english if line not in of_chinese]
    stale = [line for line in of_chinese if line not in of_english]
    text = "".join(f"\nREADME.zh-CN.md lacks {kind}: {line}" for line in absent)
    text += "".join(f"\nREADME.zh-CN.md still has {kind}: {line}" for line in stale)
    if not text and kind != "inline code" and of_english != of_chinese:
        pair = next(p for p in zip(of_english, of_chinese, strict=False) if p[0] != p[1])
        text = f"\nREADME.zh-CN.md has {kind} in another order: {pair[1]} instead of {pair[0]}"
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_both_pages_say_the_same(kind: str) -> None:
    english, chinese = ((ROOT / f"README{lang}.md").read_text("utf-8") for lang in ("", ".zh-CN"))
    assert KINDS[kind](english)
    assert not missing(kind, english, chinese)


PAGE = """`a` [x](docs/a.md)
```
make test     # run
```
| `w8a8` | 3.5 % |
"""


@pytest.mark.parametrize(
    ("kind", "old", "new", "said"),
    [
        ("code", "make test", "make tests", "lacks code: make test"),
        ("code", "make test ", "make test\nmake more", "still has code: make more"),
        ("inline code", "`a`", "`b`", "lacks inline code: a"),
        ("figures", "3.5", "3.6", "lacks figures: 3.5"),
        ("links", "docs/a", "docs/b", "lacks links: docs/a.md"),
    ],
)
def test_a_difference_is_named(kind: str, old: str, new: str, said: str) -> None:
    assert not missing(kind, PAGE, PAGE.replace("# run", "# 运行"))
    assert said in missing(kind, PAGE, PAGE.replace(old, new))
