"""The dump of one compile as a page: passes, local SQNR, ranges, kernels, and every diff."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from panguq.dumps.reader import FAILED, DumpReader
from panguq.errors import PanguqError
from panguq.pages.page import write_page
from panguq.pages.plots import stacked
from panguq.report.local_sqnr import local_sqnr, matmul_references

DIFF_LETTERS = 200_000
"""Of one pass's diff that the page holds."""
MASSIVE = 20.0
"""A range whose largest channel is this many times the median one has massive channels."""
_LAYER = re.compile(r"^(?P<before>.*?)\.?(?P<layer>\d+)\.(?P<rest>.+)$")


def write_dump_page(reader: DumpReader, path: Path) -> None:
    """Draw a dump. Raises StorageError for one that is damaged, and where nothing can be written.

    Local SQNR is measured here, on the dump's probe; without the model's weights the page says so.
    """
    sqnr, note = measured_sqnr(reader)
    tables = {stage: reader.tables(stage) for stage in reader.stages}
    write_page(path, f"panguq: {reader.path.name}", "dump.js", {
        "name": reader.path.name,
        "recipe": reader.info.recipe.get("name", ""),
        "target": reader.info.target,
        "summary": reader.summary(),
        "stages": [_stage(reader, stage, tables[stage], sqnr) for stage in reader.stages],
        "sqnr": sqnr,
        "note": note,
        "grid": layer_grid(next(reversed(sqnr.values()), {})),
        "ranges": _rows(tables, "ranges"),
        "massive": MASSIVE,
        "kernels": _rows(tables, "kernel_choices"),
        "plots": _plots(_rows(tables, "kernel_choices")),
    })  # fmt: skip


def measured_sqnr(reader: DumpReader) -> tuple[dict[str, dict[str, float]], str]:
    """By lossy stage, each matmul's local SQNR in dB; and why there is none, in a sentence."""
    found: dict[str, dict[str, float]] = {}
    whole = reader.whole_stages
    lossy = [stage for stage in whole if not reader.stage(stage).exact]
    if not lossy:
        return {}, "No pass of this dump is lossy."
    try:
        before = whole[whole.index(lossy[0]) - 1]
        references = matmul_references(reader.graph(before), reader.probe())
        for stage in lossy:
            if reader.stage(stage).changed:
                measured = local_sqnr(reader.graph(stage), references)
                found[stage] = {name: round(min(db, 999.0), 1) for name, db in measured.items()}
    except PanguqError as error:
        return {}, f"Local SQNR was not measured: {error.message}."
    return found, ""


def layer_grid(names: Mapping[str, float]) -> dict[str, Any]:
    """Matmuls' labels as a grid: kinds by layers, and those of no layer on a line of their own."""
    cells: dict[str, dict[str, str]] = {}
    layers: list[str] = []
    for name in names:
        match = _LAYER.match(name.removesuffix(":linear"))
        layer = match["layer"] if match else "-"
        kind = match["rest"] if match else name.removesuffix(":linear")
        cells.setdefault(kind, {})[layer] = name
        if layer not in layers:
            layers.append(layer)
    return {"layers": layers, "kinds": cells}


def _stage(
    reader: DumpReader,
    stage: str,
    tables: Mapping[str, str],
    sqnr: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    info = reader.stage(stage)
    measured = sqnr.get(stage, {})
    worst = min(measured, key=lambda name: measured[name]) if measured else None
    diff = reader.diff(stage)
    return {
        "name": stage,
        "failed": stage.endswith(FAILED),
        "error": reader.error(stage),
        "exact": info.exact,
        "changed": info.changed,
        "seconds": info.seconds,
        "worst": worst,
        "worst_db": measured.get(worst) if worst else None,
        "diff": diff[:DIFF_LETTERS],
        "cut": len(diff) > DIFF_LETTERS,
        "skipped": _parsed(tables.get("skipped", "")),
    }


def _rows(tables: Mapping[str, Mapping[str, str]], name: str) -> list[dict[str, Any]]:
    """The rows of the last stage that has this table."""
    texts = [found[name] for found in tables.values() if name in found]
    return _parsed(texts[-1]) if texts else []


def _parsed(text: str) -> list[dict[str, Any]]:
    return [
        {key: _number(value) for key, value in row.items() if key is not None}
        for row in csv.DictReader(io.StringIO(text))
    ]


def _number(text: str | None) -> Any:
    try:
        value = float(text or "")
    except ValueError:
        return text
    return value if abs(value) < 1e300 else text  # JSON has no inf and no nan


def _plots(kernels: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Predicted time by kind of matmul, all layers together, a prompt's and a decoding step's."""
    found = []
    for field, title in (("decode_us", "decoding step, us"), ("prefill_us", "512 tokens, us")):
        totals: dict[str, dict[str, float]] = {}
        for row in kernels:
            if isinstance(row.get(field), float):
                match = _LAYER.match(str(row["matmul"]).removesuffix(":linear"))
                kind = match["rest"] if match else str(row["matmul"])
                parts = totals.setdefault(kind, {})
                kernel = str(row["kernel"])
                parts[kernel] = parts.get(kernel, 0.0) + row[field]
        svg = stacked(list(totals.items()), title) if totals else None
        if svg is not None:
            found.append({"title": title, "svg": svg})
    return found
