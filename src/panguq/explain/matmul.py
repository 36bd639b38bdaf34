"""Why a matmul gets the kernel it gets: all candidates with their terms, as data and as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from panguq.errors import LoweringError
from panguq.ir.quant_spec import Scheme
from panguq.lowering.choice import DEFAULT_MIX, HYSTERESIS, LARGEST_M, Choice, TokenMix
from panguq.lowering.problem import Candidate, Dtype, MatmulProblem, WeightFormat
from panguq.lowering.select_kernel import select_kernel
from panguq.lowering.target import Cost, Target

_SIZE = r"[1-9][0-9]{0,8}"


@dataclass(frozen=True)
class CandidateRow:
    """A candidate and, if it is legal, its cost."""

    candidate: Candidate
    cost: Cost | None

    def as_json(self) -> dict[str, Any]:
        """Plain data; `total_us` is None and `terms` is empty for what is refused."""
        candidate = self.candidate
        return {
            "kernel": candidate.kernel,
            "schedule": candidate.schedule,
            "splits": candidate.splits,
            "tile": list(candidate.tile) if candidate.tile else None,
            "storage": candidate.storage,
            "refusal": candidate.refusal,
            "total_us": None if self.cost is None else self.cost.total_us,
            "terms": {} if self.cost is None else self.cost.terms,
            "how": "" if self.cost is None else self.cost.how,
        }


@dataclass(frozen=True)
class Explanation:
    """A matmul's candidates, cheapest first, then the refused; `choice` has the table over m."""

    problem: MatmulProblem
    target: Target
    rows: tuple[CandidateRow, ...]
    choice: Choice

    @property
    def winner(self) -> CandidateRow:
        """The cheapest legal candidate of the chosen storage."""
        return next(r for r in self._legal() if r.candidate.storage == self.choice.storage)

    @property
    def runner_up(self) -> CandidateRow | None:
        """The cheapest legal candidate with another op than the winner's."""
        winner = self.winner.candidate
        others = (r for r in self._legal() if r.candidate.kernel != winner.kernel)
        return next(others, None)

    def why(self) -> str:
        """In words, why the runner-up lost."""
        second = self.runner_up
        return "" if second is None else why_dearer(self.winner, second, self.target)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        problem, second = self.problem, self.runner_up
        return {
            "m": problem.m,
            "n": problem.n,
            "k": problem.k,
            "scheme": problem.scheme.name,
            "dtype": problem.dtype,
            "weight_format": problem.weight_format,
            "target": self.target.name,
            "storage": self.choice.storage,
            "winner": self.winner.as_json(),
            "runner_up": None if second is None else {**second.as_json(), "why": self.why()},
            "table": table_json(self.choice),
            "hysteresis": self.choice.hysteresis,
            "overlapped_terms": list(self.target.overlapped),
            "candidates": [row.as_json() for row in self.rows],
        }

    def _legal(self) -> list[CandidateRow]:
        return [row for row in self.rows if row.cost is not None]


def explain(
    problem: MatmulProblem,
    target: Target,
    mix: TokenMix = DEFAULT_MIX,
    allow_float: bool = False,
    hysteresis: float = HYSTERESIS,
) -> Explanation:
    """All candidates for a fixed m, and the table over m that the graph would have.

    Storage is the one of least cost at this m. Raises LoweringError for sizes below 1, for an m
    that is not fixed, and if no kernel is legal.
    """
    any_m = select_kernel(replace(problem, m=None), target, mix, allow_float, hysteresis)
    here = select_kernel(problem, target, mix, allow_float)
    found = target.candidates(problem, allow_float)
    rows = [CandidateRow(c, None if c.refusal else target.cost(c, problem)) for c in found]
    priced = [(row.cost.total_us, row) for row in rows if row.cost is not None]
    legal = [row for _, row in sorted(priced, key=lambda entry: entry[0])]
    refused = [r for r in rows if r.cost is None]
    choice = replace(here, table=any_m.table, hysteresis=any_m.hysteresis)
    return Explanation(problem, target, (*legal, *refused), choice)


def why_dearer(winner: CandidateRow, other: CandidateRow, target: Target) -> str:
    """Why `other` costs more than `winner`: the term that differs most."""
    assert winner.cost is not None and other.cost is not None
    extra_us = other.cost.total_us - winner.cost.total_us
    parts = [_parts(cost) for cost in (winner.cost, other.cost)]
    differences = {name: parts[1].get(name, 0.0) - parts[0].get(name, 0.0) for name in parts[1]}
    name = max(differences, key=lambda part: differences[part])
    if differences[name] <= 0:
        return f"it costs the same within {abs(extra_us):.2f} us; the one listed first is taken"
    term = other.cost.bound_by if name == "overlapped" else name
    return (
        f"{extra_us:.1f} us more ({extra_us / winner.cost.total_us:.0%}), most of all "
        f"{differences[name]:.1f} us for {target.terms[term]} ({term})"
    )


def _parts(found: Cost) -> dict[str, float]:
    """The serial terms, and what the overlapped ones take together."""
    if not found.overlapped:
        return dict(found.terms)
    serial = {name: us for name, us in found.terms.items() if name not in found.overlapped}
    return serial | {"overlapped": found.terms[found.bound_by]}


def table_json(choice: Choice) -> list[dict[str, Any]]:
    """The table over m as plain data."""
    return [
        {
            "first_m": entry.first_m,
            "last_m": entry.last_m,
            "kernel": entry.candidate.kernel,
            "schedule": entry.candidate.schedule,
            "splits": entry.candidate.splits,
            "tile": list(entry.candidate.tile) if entry.candidate.tile else None,
        }
        for entry in choice.table
    ]


# --- the shape on the command line --------------------------------------------------------------


def looks_like_shape(text: str) -> bool:
    """Whether this is meant as a shape, not as a folder."""
    return "/" not in text and "\\" not in text and bool(re.fullmatch(r"[^x]*(x[^x]*)+", text))


def parse_shape(
    text: str,
    scheme: Scheme,
    dtype: Dtype = "bfloat16",
    weight_format: WeightFormat = "ND",
) -> MatmulProblem:
    """The problem that `MxNxK` spells, such as 128x256x2048. Raises LoweringError if none."""
    hint = "write m, n and k as whole numbers from 1 up, as in 128x256x2048"
    parts = text.split("x")
    if len(parts) != 3 or any(not part for part in parts):
        raise LoweringError(f"shape {text!r}: is not MxNxK", hint)
    sizes = []
    for name, part in zip("mnk", parts, strict=True):
        if re.fullmatch(_SIZE, part):
            sizes.append(int(part))
        elif name == "m" and re.fullmatch(r"[A-Za-z_*?]\w*", part):
            raise LoweringError(
                f"shape {text!r}: m is symbolic and has no bounds",
                "give a number of tokens; the table over all m is part of the answer",
            )
        elif re.fullmatch(r"0+", part):
            raise LoweringError(f"shape {text!r}: {name} is zero", hint)
        elif re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?", part):
            raise LoweringError(
                f"shape {text!r}: {name}={part} is not a whole number from 1 to 999999999", hint
            )
        else:
            raise LoweringError(f"shape {text!r}: {name}={part!r} is not a number", hint)
    m, n, k = sizes
    return MatmulProblem(m, n, k, scheme, dtype=dtype, weight_format=weight_format)


# --- text ---------------------------------------------------------------------------------------


def render(found: Explanation) -> str:
    """The explanation for a reader."""
    problem, winner, second = found.problem, found.winner, found.runner_up
    legal = [row for row in found.rows if row.cost is not None]
    lines = [
        f"{problem.m} x {problem.n} x {problem.k} (m x n x k), {problem.scheme.name}, "
        f"{problem.dtype}, target {found.target.name}: {len(legal)} legal candidates of "
        f"{len(found.rows)}",
        "",
        f"winner: {_headline(winner)}",
        *_term_lines(winner.cost),
    ]
    if second is not None:
        lines += ["", f"runner-up: {_headline(second)}", f"  lost by {found.why()}"]
        lines += _term_lines(second.cost)
    shown = {row.candidate.kernel for row in (winner, second) if row is not None}
    best = _best_of_each(legal, shown)
    if best:
        lines += ["", "other kernels, each at its best:"]
        lines += [f"  {_headline(row)}" for row in best]
    refused = {
        f"{r.candidate.kernel}: {r.candidate.refusal}": None for r in found.rows if not r.cost
    }
    if refused:
        lines += ["", "refused:", *(f"  {reason}" for reason in list(refused)[:8])]
        if len(refused) > 8:
            lines.append(f"  and {len(refused) - 8} more tiles and splits (--json lists all)")
    lines += ["", *table_lines(found.choice)]
    return "\n".join(lines)


def table_lines(choice: Choice) -> list[str]:
    """The table over m, a range a line."""
    if not choice.table:
        few = choice.few_tokens
        return [f"for every m: {choice.kernel}" + (f" (few_tokens={few})" if few else "")]
    exact = "the cheapest for every m" if choice.hysteresis == 0 else None
    rule = exact or f"never more than {choice.hysteresis:.0%} above the cheapest"
    lines = [f"by number of tokens, on {choice.storage} weights ({rule} up to {LARGEST_M}):"]
    for entry in choice.table:
        last = "…" if entry.last_m is None else str(entry.last_m)
        lines.append(f"  m {entry.first_m:>5} to {last:<5} {entry.candidate}")
    return lines


def _headline(row: CandidateRow) -> str:
    assert row.cost is not None
    how = f"  ({row.cost.how})" if row.cost.how not in ("", str(row.candidate)) else ""
    return f"{row.candidate}  {row.cost.total_us:.1f} us{how}"


def _term_lines(cost: Cost | None) -> list[str]:
    assert cost is not None
    overlapped = {name: cost.terms[name] for name in cost.overlapped if cost.terms[name]}
    serial = {n: us for n, us in cost.terms.items() if n not in cost.overlapped and us}
    lines = [f"  one after another: {_list(serial)}"]
    if overlapped:
        lines.append(f"  at the same time:  {_list(overlapped)}; {cost.bound_by} decides")
    return lines


def _list(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in terms.items())


def _best_of_each(legal: Sequence[CandidateRow], shown: set[str]) -> list[CandidateRow]:
    best: dict[str, CandidateRow] = {}
    for row in legal:
        if row.candidate.kernel not in shown:
            best.setdefault(row.candidate.kernel, row)
    return list(best.values())
