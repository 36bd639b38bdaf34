"""The comparison's tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bench.peers.rows import GROUP_SIZES, METHODS
from bench.results import Row, markdown_table

QUALITY = ("perplexity", "above float", "KL", "top-1")
COST = ("quantize", "CPU time", "whole process", "peak memory", "of it anonymous")
TITLES = {
    "smollm2": "SmolLM2-135M, group 64",
    "random": "Random Llama (hidden 1024, ffn 2816, 4 layers), group 128: time and memory",
}


def tables(rows: Mapping[str, Row]) -> str:
    """A table for each model with rows, then versions and what failed."""
    parts = []
    for model in GROUP_SIZES:
        own = {name: row for name, row in rows.items() if name.startswith(f"{model}/")}
        if own:
            parts.append(f"**{TITLES[model]}**\n\n{_table(model, own)}")
    return "\n\n".join([*parts, *_versions(rows), *_errors(rows)])


def _table(model: str, rows: Mapping[str, Row]) -> str:
    # Random weights have no perplexity worth a column.
    quality = QUALITY if model == "smollm2" else ("KL",)
    ordered = sorted(rows, key=lambda name: list(METHODS).index(name.split("/")[1]))
    lines = (
        [METHODS[name.split("/")[1]], name.split("/")[2], *_cells(rows[name], quality)]
        for name in ordered
        if "error" not in rows[name]
    )
    return markdown_table(("scheme", "by", *quality, *COST), lines)


def _cells(row: Row, quality: tuple[str, ...]) -> Iterator[str]:
    values = {
        "perplexity": f"{row['perplexity']:.3f}",
        "above float": f"{100 * (row['perplexity'] / row['float_perplexity'] - 1):+.2f} %",
        "KL": f"{row['kl']:.3g}",
        "top-1": f"{100 * row['top1']:.1f} %",
        "quantize": f"{row['quantize_seconds']:.0f} s",
        "CPU time": f"{row['quantize_cpu_seconds']:.0f} s",
        "whole process": f"{row['process_seconds']:.0f} s",
        "peak memory": f"{row['peak_resident_mib']:.0f} MiB",
        "of it anonymous": f"{row['peak_anonymous_mib']:.0f} MiB",
    }
    return (values[column] for column in (*quality, *COST))


def _versions(rows: Mapping[str, Row]) -> Iterator[str]:
    found = {name.split("/")[2]: row["versions"] for name, row in rows.items() if "versions" in row}
    if found:
        lines = (
            f"{peer}: {', '.join(f'{package} {v}' for package, v in versions.items())}."
            for peer, versions in found.items()
        )
        yield "\n".join(f"- {line}" for line in lines)


def _errors(rows: Mapping[str, Row]) -> Iterator[str]:
    failed = [f"- `{name}` failed: {row['error']}" for name, row in rows.items() if "error" in row]
    if failed:
        yield "\n".join(failed)
