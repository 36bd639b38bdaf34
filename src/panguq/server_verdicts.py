"""What a server will say to a compile, before anything is calibrated: out of `panguq.servers` and
`panguq.server_models`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from panguq.errors import InputError
from panguq.server_models import class_answer
from panguq.server_releases import Release, Server, find_release
from panguq.servers import NPU_SERVERS, READS, ServedFormat, Support, support, too_large


class Matmul(Protocol):
    """What a verdict needs of a matmul `[m, k] x [n, k]^T`; a `MatmulPlan` has it."""

    @property
    def name(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def scheme(self) -> str: ...
    @property
    def group_size(self) -> int | None: ...


@runtime_checkable
class _Plan(Protocol):
    @property
    def matmuls(self) -> tuple[Matmul, ...]: ...
    @property
    def model_type(self) -> str | None: ...
    @property
    def architectures(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Refusal:
    """A matmul that a server has no kernel for, why, and what to choose instead."""

    matmul: str
    scheme: str
    reason: str
    instead: str
    source: str


@dataclass(frozen=True)
class ServerVerdict:
    """What a server will say to a compiled model written in `format`. `no_class`: why it cannot
    build the model, empty if it can, or if that is not known, which is a note."""

    server: Server
    format: ServedFormat
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    no_class: str = ""
    version: str = ""

    @property
    def takes(self) -> bool:
        """Whether it has a kernel for every matmul, and no lack of a class for them is known."""
        return not self.refusals and not self.no_class

    def render(self) -> str:
        """The verdict as text; matmuls that are refused for one reason share a line."""
        name = f"{self.server}=={self.version}" if self.version else self.server
        head = f"{name} with format={self.format!r}"
        if not self.refusals:
            lines = [f"{head}: takes every matmul"]
        else:
            lines = [f"{head}: refuses {len(self.refusals)} matmuls"]
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for entry in self.refusals:
            key = (entry.scheme, entry.reason, entry.instead, entry.source)
            groups.setdefault(key, []).append(entry.matmul)
        for (scheme, reason, instead, source), names in groups.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            where = f" [{source}]" if source else ""
            lines.append(f"  {names[0]}{more} ({scheme}): {reason}; choose {instead}{where}")
        if self.no_class:
            lines.insert(0, f"{head}: refuses the model: {self.no_class}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def verdicts(
    plan_or_matmuls: _Plan | Iterable[Matmul],
    server: str,
    *,
    splits_outliers: bool = False,
    format: str | None = None,
) -> ServerVerdict:
    """The matmuls that a server has no kernel for, in the format of which it takes most.

    plan_or_matmuls: a dry run's result, or its matmuls. splits_outliers: whether the recipe may
    split channels off into a second matmul, which no format can express. format: the format to
    judge instead. server: `NAME` or `NAME==VERSION`. Raises InputError for a server or a version
    that panguq knows nothing of, or a format that it does not read.
    """
    release = find_release(server)
    known = release.server
    plan = plan_or_matmuls
    rows = tuple(plan.matmuls if isinstance(plan, _Plan) else plan)
    forms = [form for form in READS[known] if format in (None, form)]
    if not forms:
        raise InputError(
            f"{server} does not read the format {format!r}", f"it reads {', '.join(READS[known])}"
        )
    refusals = {form: _refusals(rows, release, form) for form in forms}
    best = min(refusals, key=lambda form: len(refusals[form]))
    notes = (*_otherwise(rows, release, best), *_notes(rows, known, splits_outliers))
    if not isinstance(plan, _Plan) or plan.model_type is None:
        return ServerVerdict(known, best, refusals[best], notes, version=release.version)
    said = {"model_type": plan.model_type, "architectures": plan.architectures}
    answer = class_answer(known, said)
    if answer.has is None:
        notes = (*notes, answer.reason)
    no_class = answer.reason if answer.has is False else ""
    return ServerVerdict(known, best, refusals[best], notes, no_class, release.version)


def _refusals(rows: Sequence[Matmul], release: Release, form: ServedFormat) -> tuple[Refusal, ...]:
    found = []
    server = release.server
    for row in rows:
        entry = _entry(row, release, form)
        limit = too_large(server, row.scheme, row.n, row.k)
        if not entry.takes:
            found.append(Refusal(row.name, row.scheme, entry.reason, entry.instead, entry.source))
        elif limit:
            found.append(Refusal(row.name, row.scheme, limit, "FLOAT", "op-plugin"))
    return (*found, *_mixed_experts(rows, server))


def _entry(row: Matmul, release: Release, form: ServedFormat) -> Support:
    of_experts, has_bias = getattr(row, "experts", 1) > 1, getattr(row, "bias", False)
    return support(
        release.server, form, row.scheme, row.group_size, of_experts, release.version, has_bias
    )


def _otherwise(rows: Sequence[Matmul], release: Release, form: ServedFormat) -> list[str]:
    """What a server that takes the matmuls computes otherwise than panguq does."""
    entries = [_entry(row, release, form) for row in rows]
    return list(dict.fromkeys(entry.note for entry in entries if entry.takes and entry.note))


def mixed_layers(rows: Iterable[Matmul]) -> dict[str, list[str]]:
    """The modules in which a layer's experts lie that have several schemes, with these."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        if getattr(row, "experts", 1) > 1:
            kinds.setdefault(row.name.rpartition(".")[0], set()).add(row.scheme)
    return {layer: sorted(found) for layer, found in kinds.items() if len(found) > 1}


def _mixed_experts(rows: Sequence[Matmul], server: Server) -> list[Refusal]:
    """The vLLMs build all of a layer's experts by the scheme of the first."""
    if server not in ("vllm", "vllm-ascend"):
        return []
    return [
        Refusal(
            layer,
            ", ".join(kinds),
            "the experts of one layer have several schemes",
            "one for all of them, by one glob of the recipe",
            "vLLM, layers/fused_moe/layer.py",
        )
        for layer, kinds in mixed_layers(rows).items()
    ]


def _notes(rows: tuple[Matmul, ...], server: Server, splits: bool) -> tuple[str, ...]:
    notes = []
    schemes = {row.scheme.partition("-")[0] for row in rows}
    if splits:
        notes.append(
            "the recipe may split outlier channels off into float matmuls, which no checkpoint "
            "format can express; take w8a8-serving or w8a8-dynamic-serving, or another treatment"
        )
    if server == "vllm-ascend" and "W8A16" in schemes:
        notes.append(
            "it hands a W8A16 linear's bias over in the model's dtype, where the op's page wants "
            "float32 for bfloat16: not established on an NPU"
        )
    if server in NPU_SERVERS:
        notes.append("compile with dtype=bfloat16 or float16: no NPU kernel takes float32 inputs")
    return tuple(notes)
