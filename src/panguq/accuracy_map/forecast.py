"""How long the map would take with all items, from what its cells took with some."""

from __future__ import annotations

from collections.abc import Sequence

from panguq.accuracy_map.folder import Cell


def seconds_for_all(cells: Sequence[Cell]) -> float | None:
    """The cells' seconds, each times how many items its task has for each that it took.

    None where every cell took all, or none says how many there are.
    """
    known = [c for c in cells if c.get("items") and c.get("all_items") and c.get("seconds")]
    if not known or all(c["items"] >= c["all_items"] for c in known):
        return None
    return float(sum(c["seconds"] * c["all_items"] / c["items"] for c in known))
