"""What a dry run found, as data and as text."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from panguq.report.left_in_float import any_layer


class MatmulPlan(BaseModel):
    """One matmul `[m, k] x [n, k]^T`: its scheme, its kernel with predicted microseconds at one
    token and at 512, and why each other kernel was not taken. No kernel: it is refused. Of a
    mixture of experts it is the same matmul of `experts` experts, each `[n, k]`."""

    model_config = ConfigDict(frozen=True)
    name: str
    n: int
    k: int
    scheme: str
    group_size: int | None = None
    kernel: str | None
    few_tokens: int = 0
    decode_us: float | None = None
    prefill_us: float | None = None
    others: dict[str, str] = {}
    gives_logits: bool = False
    bias: bool = False
    experts: int = 1
    note: str = ""


class Plan(BaseModel):
    """A compile that has not happened. `refusals` is empty if it would start. `model_type` and
    `architectures`: what a served config.json would say; None of other models. `only_counted`:
    pieces of the model that are not in the graph, with their number of weights, which stay float
    and are part of all sizes. `forecast`: of a request on a server, as `panguq explain --server
    --json` prints it; None for a CPU."""

    model_config = ConfigDict(frozen=True)
    recipe: str
    model_type: str | None = None
    architectures: tuple[str, ...] = ()
    target: str
    passes: tuple[str, ...]
    inputs: dict[str, list[str | int]]
    nodes: int
    matmuls: tuple[MatmulPlan, ...]
    smoothing_sites: dict[str, int]
    smoothing_blocked: dict[str, str]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    only_counted: dict[str, int] = {}
    calibration_tokens: int
    weight_bytes: int
    disk_bytes: int
    temporary_bytes: int = 0
    peak_bytes: int
    trace_seconds: float
    compile_seconds: float
    forecast: dict[str, Any] | None = None

    @property
    def shares(self) -> dict[str, float]:
        """The share of all linear weights, every expert's among them, that each scheme has."""
        sizes: dict[str, int] = {}
        for row in self.matmuls:
            sizes[row.scheme] = sizes.get(row.scheme, 0) + row.n * row.k * row.experts
        if self.only_counted:
            sizes["FLOAT"] = sizes.get("FLOAT", 0) + sum(self.only_counted.values())
        total = sum(sizes.values())
        ordered = sorted(sizes.items(), key=lambda item: -item[1])
        return {scheme: size / total for scheme, size in ordered} if total else {}

    def render(self) -> str:
        """The plan as text. Matmuls that differ only in their layer share a line."""
        more = self.temporary_bytes > 0
        lines = [
            f"recipe {self.recipe}, target {self.target}: {' > '.join(self.passes)}",
            f"graph: {self.nodes} nodes, {sum(row.experts for row in self.matmuls)} matmuls; not "
            "compared with the model, whose weights a plan does not run",
            *(f"  {name} {shape}" for name, shape in self._first_inputs().items()),
            "",
            *self._matmul_lines(),
            "",
            *self._smoothing_lines(),
            *self._only_counted_lines(),
            f"weights now {_size(self.weight_bytes)}; on disk about {_size(self.disk_bytes)}"
            + (f", and {_size(self.temporary_bytes)} more while it compiles" if more else ""),
            "of all linear weights: "
            + (", ".join(f"{share:.1%} {name}" for name, share in self.shares.items()) or "none"),
            f"compiling takes about {self.compile_seconds:.0f} s on one thread with "
            f"{self.calibration_tokens} calibration tokens, of which the trace took "
            f"{self.trace_seconds:.0f} s; peak memory about {_size(self.peak_bytes)} (estimates)",
        ]
        lines += self._forecast_lines()
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.refusals:
            lines += ["", "refused:", *(f"  {refusal}" for refusal in _grouped(self.refusals))]
        return "\n".join(lines)

    def _first_inputs(self) -> dict[str, list[str | int]]:
        """All but the cache, of which the first tensor of each kind stands for the others."""
        cache: dict[str, str] = {}
        for name in self.inputs:
            if name.startswith("past_"):
                cache.setdefault(name.split("_")[1], name)
        shown = set(cache.values())
        return {n: s for n, s in self.inputs.items() if n in shown or not n.startswith("past_")}

    def _matmul_lines(self) -> list[str]:
        groups: dict[tuple[str, ...], int] = {}
        why: dict[str, str] = {}
        for row in self.matmuls:
            cells = _cells(row)
            groups[cells] = groups.get(cells, 0) + row.experts
            why |= {f"{row.scheme} n={row.n} k={row.k}, {k}": v for k, v in row.others.items()}
        head = ("matmul", "n", "k", "scheme", "kernel", "us at m=1", "m=512", "note")
        rows = [(*cells[:1], str(count), *cells[1:]) for cells, count in groups.items()]
        lines = _table([(head[0], "count", *head[1:]), *rows])
        if why:
            lines += ["", "kernels that were not taken:"]
            lines += [f"  {what}: {reason}" for what, reason in why.items()]
        return lines

    def _only_counted_lines(self) -> list[str]:
        if not self.only_counted:
            return []
        pieces = (f"{name} {count / 1e6:.1f}" for name, count in self.only_counted.items())
        said = "not in the graph and counted as float, in millions of weights"
        return [f"{said}: {', '.join(pieces)}"]

    def _forecast_lines(self) -> list[str]:
        found = self.forecast
        if found is None:
            return []
        return [
            f"a prompt of {found['prompt']} and {found['new_tokens']} new tokens on "
            f"{found['server']} in {found['mode']} mode (predicted; panguq explain --server asks "
            f"for others): first token {found['ttft_ms']:.0f} ms, each other "
            f"{found['tpot_ms']:.1f} ms; {found['verdict']}",
            *(f"note: {note}" for note in found["notes"]),
        ]

    def _smoothing_lines(self) -> list[str]:
        if not self.smoothing_sites and not self.smoothing_blocked:
            return []
        counts = ", ".join(f"{count} {kind}" for kind, count in self.smoothing_sites.items())
        blocked = len(self.smoothing_blocked)
        return [f"smoothing sites: {counts}; {blocked} other outputs cannot be rescaled"]


def _cells(row: MatmulPlan) -> tuple[str, ...]:
    groups = f" g{row.group_size}" if row.group_size else ""
    costs = [f"{us:.0f}" if us is not None else "-" for us in (row.decode_us, row.prefill_us)]
    name = any_layer(row.name)
    return (name, str(row.n), str(row.k), row.scheme + groups, row.kernel or "-", *costs, row.note)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _grouped(texts: tuple[str, ...]) -> list[str]:
    counts: dict[str, int] = {}
    for text in map(any_layer, texts):
        counts[text] = counts.get(text, 0) + 1
    return [f"{text} ({count} times)" if count > 1 else text for text, count in counts.items()]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
