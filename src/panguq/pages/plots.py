"""Plots for pages, drawn once by matplotlib as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

Points = Mapping[str, tuple[float, float]]


def pareto(points: Points, lower_is_better: bool) -> list[str]:
    """The names that no other point beats in both bits and quality, from few bits to many."""
    sign = 1 if lower_is_better else -1
    front: list[str] = []
    best = float("inf")
    for name, (_, value) in sorted(points.items(), key=lambda p: (p[1][0], sign * p[1][1])):
        if sign * value < best:
            best = sign * value
            front.append(name)
    return front


def scatter(points: Points, title: str, *, lower_is_better: bool, log: bool = False) -> str | None:
    """Bits a weight against a quality, with the Pareto front; SVG in base64.

    None where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    front = pareto(points, lower_is_better)
    axes.plot([points[n][0] for n in front], [points[n][1] for n in front], "-", color="#c0392b",
              linewidth=1.2, label="Pareto front")  # fmt: skip
    for name, (bits, value) in points.items():
        axes.plot([bits], [value], "o", color="#c0392b" if name in front else "#34495e")
        axes.annotate(name, (bits, value), textcoords="offset points", xytext=(5, 4), fontsize=7)
    if log and all(value > 0 for _, value in points.values()):
        axes.set_yscale("log")
    axes.margins(x=0.15, y=0.1)  # room for the names
    axes.set_xlabel("bits a weight")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure)


def grouped_bars(rows: Mapping[str, Mapping[str, float]], title: str) -> str | None:
    """A bar for every row's every part, a colour for each part, and a line at 1; SVG in base64.

    None where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    figure = Figure(figsize=(6, 1 + 0.2 * len(rows) * (len(names) + 1)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        found = [(y, parts[name]) for y, parts in enumerate(rows.values()) if name in parts]
        at = [y + (place - (len(names) - 1) / 2) * height for y, _ in found]
        axes.barh(at, [value for _, value in found], height=height, label=name)
    axes.axvline(1, color="#34495e", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.legend(fontsize=7)
    return _svg(figure)


def stacked(rows: Sequence[tuple[str, Mapping[str, float]]], title: str) -> str | None:
    """A bar a row, its parts stacked by name; SVG in base64, None without matplotlib."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.8 + 0.26 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    left = [0.0] * len(rows)
    for name in names:
        widths = [parts.get(name, 0.0) for _, parts in rows]
        axes.barh(range(len(rows)), widths, left=left, label=name)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.legend(fontsize=7)
    return _svg(figure)


def _svg(figure: object) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]
    return base64.b64encode(file.getvalue()).decode("ascii")
