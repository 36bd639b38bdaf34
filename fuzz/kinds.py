"""All kinds of attack. A new one is a file beside this, and a line here."""

from __future__ import annotations

from fuzz import crafted_files, environments, flips, kills, recipe_texts
from fuzz.kind import Kind

KINDS: tuple[Kind, ...] = (
    recipe_texts.KIND, crafted_files.KIND, flips.KIND, kills.KIND, environments.KIND,
)  # fmt: skip
