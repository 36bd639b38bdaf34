"""The accuracy table in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from bench.results import Row, markdown_table

COLUMNS = (
    "recipe", "perplexity", "above float", "KL", "top-1", "bits/weight", "groups",
    "static / dynamic", "compile, CPU", "peak memory, anonymous",
)  # fmt: skip


def table(rows: Mapping[str, Row]) -> str:
    """The table, and below it where each collapsed recipe broke and what is not there."""
    notes = [*_broken(rows), *_errors(rows)]
    lines = markdown_table(COLUMNS, (_cells(n, r) for n, r in rows.items() if "error" not in r))
    return "\n".join([lines, *([""] if notes else []), *notes])


def _cells(name: str, row: Row) -> list[str]:
    bits = f"{row['bits_per_weight']:.2f}"
    if "compile_cpu_seconds" not in row:  # the float model itself
        return [name, plain(row["perplexity"]), "", "", "", bits, "", "", "", ""]
    return [
        f"`{name}`",
        plain(row["perplexity"]),
        above(row) + (f" (lowered {above(row['lowered'])})" if "lowered" in row else ""),
        f"{row['kl']:.4f}",
        f"{100 * row['top1']:.1f} %",
        bits,
        ", ".join(f"{kind} ({count})" for kind, count in row["groups"].items()),
        f"{100 * row['static_share']:.0f} / {100 * row['dynamic_share']:.0f} %",
        f"{row['compile_cpu_seconds']:.0f} s",
        f"{row['peak_anonymous_mib']:.0f} MiB",
    ]


def plain(perplexity: float) -> str:
    """Three decimals, or as many digits as a collapsed model's perplexity deserves."""
    return f"{perplexity:.3f}" if perplexity < 1000 else f"{perplexity:.3g}"


def above(row: Row) -> str:
    """Perplexity above the float model's, in per cent; from ten times on as a factor."""
    ratio = row["perplexity"] / row["float_perplexity"]
    if not math.isfinite(ratio):
        return "not finite"
    return f"{100 * (ratio - 1):+.2f} %" if ratio < 10 else f"{ratio:.3g} times"


def _broken(rows: Mapping[str, Row]) -> Iterator[str]:
    for name, row in rows.items():
        if row.get("broken"):
            yield f"- `{name}` collapsed; the first that broke is `{row['broken']}`."


def _errors(rows: Mapping[str, Row]) -> Iterator[str]:
    for name, row in rows.items():
        if "error" in row:
            yield f"- `{name}`: {row['error']}"
