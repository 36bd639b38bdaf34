"""All kinds of attack. A new one is a file beside this, and a line here."""

from __future__ import annotations

from fuzz import (
    compiles,
    crafted_files,
    environments,
    flips,
    graphs,
    kills,
    modules,
    recipe_texts,
)
from fuzz.kind import Kind

KINDS: tuple[Kind, ...] = (
    recipe_texts.KIND, compiles.KIND, modules.KIND, graphs.KIND,
    crafted_files.KIND, flips.KIND, kills.KIND, environments.KIND,
)  # fmt: skip
