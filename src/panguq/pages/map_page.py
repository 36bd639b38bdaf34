"""`map/index.html`: the heat map, what every cell is made of, and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from panguq.accuracy_map.folder import FIELDS, Cell, MapFolder, json_plain
from panguq.pages.page import write_page
from panguq.pages.plots import grouped_bars, scatter
from panguq.tasks.task_list import TASKS

SHOWN = 3
LETTERS = 1500
"""Of a prompt's end, an answer or a log, what the page holds."""


def write_map_page(folder: MapFolder) -> None:
    """Draw the page from what is in the folder."""
    cells = folder.cells()
    by_name = {_column(cell): cell for cell in cells if cell["recipe"] == "float"}
    data = {
        "model": folder.about().get("model", ""),
        "fields": FIELDS,
        "cells": [_cell(folder, cell, by_name.get(_column(cell))) for cell in cells],
        "plots": _plots(cells),
    }
    write_page(folder.path / "index.html", "Accuracy map", "map.js", json_plain(data))


def _column(cell: Cell) -> tuple[Any, ...]:
    return cell["task"], cell.get("thinking"), cell["limit"], cell["seed"], cell["protocol"]


def _cell(folder: MapFolder, cell: Cell, floats: Cell | None) -> Cell:
    log = folder.log_file(cell["name"])
    more = {
        "kind": _kind(cell),
        "log": log.read_text("utf-8", errors="replace")[-LETTERS:] if log.exists() else "",
        "shown": _answers(folder, cell, floats),
    }
    return {name: cell.get(name) for name in FIELDS} | cell | more


def _answers(folder: MapFolder, cell: Cell, floats: Cell | None) -> list[dict[str, str]]:
    """Three items with both answers, those first that the recipe lost."""
    own = folder.items(cell["name"])
    before = folder.items(floats["name"]) if floats else []
    pairs = [(x, y) for x, y in zip(before, own, strict=False) if y["prompt"]]
    pairs.sort(key=lambda pair: pair[1]["score"] - pair[0]["score"])
    return [
        {
            "prompt": y["prompt"][-LETTERS:],
            "float": _said(x),
            "answer": _said(y),
            "right": y["right"][:LETTERS],
        }
        for x, y in pairs[:SHOWN]
    ]


def _said(item: dict[str, Any]) -> str:
    note = f"\n[{item['note']}]" if item.get("note") else ""
    return item["answer"][:LETTERS] + note


def _plots(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """Bits a weight against KL and against accuracy, means over the tasks that all recipes have."""
    found = []
    for field, title, lower in (
        ("kl", "KL(float ‖ recipe), nats, mean over tasks", True),
        ("value", "accuracy, mean over tasks", False),
    ):
        chosen = [c for c in cells if field == "kl" or _kind(c) != "perplexity"]
        points = _means(chosen, field)
        if len(points) > 1:
            svg = scatter(points, title, lower_is_better=lower, log=field == "kl")
            if svg is not None:
                found.append({"title": title, "svg": svg})
    title = "tokens an answer, over float's"
    inflation = _inflation(cells)
    svg = grouped_bars(inflation, title) if inflation else None
    return [*found, {"title": title, "svg": svg}] if svg is not None else found


def _inflation(cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """By recipe and task, in each mode of thinking, how much longer answers are than float's."""
    found: dict[str, dict[str, float]] = {}
    for cell in cells:
        if cell.get("inflation") is not None:
            modes = found.setdefault(f"{cell['recipe']}, {cell['task']}", {})
            modes[cell.get("thinking") or "as asked"] = cell["inflation"]
    return found


def _kind(cell: Cell) -> str:
    """Of its task; a cell of another of lm-eval's says it itself, if it has figures."""
    task = TASKS.get(cell["task"])
    return task.kind if task else str(cell.get("kind", "choice"))


def _means(cells: Sequence[Cell], field: str) -> dict[str, tuple[float, float]]:
    """By recipe, (bits a weight, mean of the field) over the columns that every recipe with
    figures has."""
    by_recipe: dict[str, dict[Any, Cell]] = {}
    for cell in cells:
        if cell.get(field) is not None and cell.get("bits_per_weight") is not None:
            by_recipe.setdefault(cell["recipe"], {})[_column(cell)] = cell
    by_recipe.pop("float", None) if field == "kl" else None
    if not by_recipe:
        return {}
    shared = set.intersection(*(set(columns) for columns in by_recipe.values()))
    if not shared:
        return {}
    return {
        recipe: (
            next(iter(columns.values()))["bits_per_weight"],
            sum(columns[name][field] for name in shared) / len(shared),
        )
        for recipe, columns in by_recipe.items()
    }
