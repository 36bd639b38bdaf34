"""A forecast for a reader: a verdict in a sentence, a page, and plain data."""

from __future__ import annotations

from typing import Any

from panguq.forecast.forecast import Forecast, ServedStep, memory_mib
from panguq.forecast.memory import MIB

NO_DIFFERENCE = 0.03
"""Requests whose times differ by less are called equal: repeated runs differ by as much."""


def verdict(found: Forecast) -> str:
    """Whether to quantize the model so, in a sentence."""
    decode = found.times.decode
    rules = f"the {decode.bound_by} is the limit of decoding"
    over = _too_large(found)
    if found.is_float:
        return f"{over}the float model: {rules}"
    saved = (found.float_memory.weights - found.memory.weights) / 2**30
    saves = (
        f"{found.scheme} saves {saved:.1f} GiB" if saved > 0 else f"{found.scheme} saves nothing"
    )
    gain = found.gain
    if gain < 1 - NO_DIFFERENCE:
        why = "the host is the limit" if decode.bound_by == "host" else "its kernels take longer"
        return (
            f"{over}do not quantize this for speed: {why}; {saves} and makes a request take "
            f"{1 / gain - 1:.0%} longer"
        )
    if gain <= 1 + NO_DIFFERENCE:
        why = "the host is the limit" if decode.bound_by == "host" else "its kernels gain nothing"
        return f"{over}do not quantize this for speed: {why}; {saves} and no time"
    phase = "prompt" if _saved(found, "prefill") > _saved(found, "decode") else "decoding"
    return (
        f"{over}quantize this for speed: a request takes {1 - 1 / gain:.0%} less time, most of it "
        f"of the {phase}; {saves}"
    )


def _saved(found: Forecast, phase: str) -> float:
    steps = found.request.new_tokens - 1 if phase == "decode" else 1
    return float(steps * (getattr(found.float_times, phase).ms - getattr(found.times, phase).ms))


def _too_large(found: Forecast) -> str:
    if found.fits is not False:
        return ""
    needed, usable = (
        found.memory.needed(found.request.batch, found.request.context),
        found.memory.usable,
    )
    assert usable is not None
    return (
        f"it does not fit: {needed / 2**30:.1f} GiB of {usable / 2**30:.1f} that the server takes "
        "of the card; beyond that, "
    )


def as_json(found: Forecast) -> dict[str, Any]:
    """The forecast as plain data; times are milliseconds, memory MiB on one card."""
    return {
        "target": found.target,
        "scheme": found.scheme,
        "dtype": found.dtype,
        "server": found.path.name,
        "mode": found.path.mode,
        "batch": found.request.batch,
        "prompt": found.request.prompt,
        "new_tokens": found.request.new_tokens,
        "tp": found.cards.tensor,
        "ep": found.cards.experts,
        "ttft_ms": found.times.prefill.ms,
        "tpot_ms": found.times.decode.ms,
        "request_s": found.times.request_s,
        "tokens_per_s": found.times.tokens_per_s,
        "terms": {
            "ttft": found.times.prefill.as_json(),
            "tpot": found.times.decode.as_json(),
        },
        "memory_mib": memory_mib(found),
        "fits": found.fits,
        "largest_batch": found.memory.largest_batch(found.request.context),
        "longest_context": found.memory.longest(found.request.batch),
        "float": {
            "ttft_ms": found.float_times.prefill.ms,
            "tpot_ms": found.float_times.decode.ms,
            "request_s": found.float_times.request_s,
            "terms": {
                "ttft": found.float_times.prefill.as_json(),
                "tpot": found.float_times.decode.as_json(),
            },
            "memory_mib": memory_mib(found, as_float=True),
        },
        "gain_over_float": found.gain,
        "verdict": verdict(found),
        "notes": list(found.notes),
        "source": found.path.source,
    }


def render(found: Forecast) -> str:
    """The forecast as text."""
    request, path = found.request, found.path
    cards = f", {found.cards.tensor} cards" if found.cards.tensor > 1 else ""
    head = (
        f"{found.scheme} on {found.target}{cards}, {found.dtype}, served by {path.server} "
        f"{path.versions[0]} in {path.mode} mode (predicted)"
    )
    asked = (
        f"{request.batch} {'sequences' if request.batch > 1 else 'sequence'}, prompt "
        f"{request.prompt}, {request.new_tokens} new tokens"
    )
    times, plain = found.times, found.float_times
    rows: list[tuple[str, ...]] = [("", found.scheme, found.dtype, "limit", "host ms", "device ms")]
    for name, step, other in (
        ("time to first token, ms", times.prefill, plain.prefill),
        ("time per output token, ms", times.decode, plain.decode),
    ):
        cells = (f"{step.ms:.1f}", f"{other.ms:.1f}", step.bound_by)
        rows.append((name, *cells, f"{step.host_ms:.1f}", f"{step.device_ms:.1f}"))
    rows.append(("request, s", f"{times.request_s:.2f}", f"{plain.request_s:.2f}", "", "", ""))
    speed = (f"{times.tokens_per_s:.0f}", f"{plain.tokens_per_s:.0f}", "", "", "")
    rows.append(("new tokens a second", *speed))
    ours, floats = memory_mib(found), memory_mib(found, as_float=True)
    for part in ("weights", "kv_cache", "activations", "total"):
        sizes = (f"{of[part] or 0:.0f}" for of in (ours, floats))
        rows.append((f"{part.replace('kv_', 'KV ')}, MiB", *sizes, "", "", ""))
    lines = [head, asked, "", *_table(rows), ""]
    lines += [f"{name}: {_parts(step)}" for name, step in _steps(found)]
    lines += _room(found)
    lines += ["", f"{found.gain:.2f} times as fast as {found.dtype}: {verdict(found)}"]
    lines += [f"note: {note}" for note in found.notes]
    lines += ["", f"launch path: {path.source}"]
    return "\n".join(lines)


def _steps(found: Forecast) -> list[tuple[str, ServedStep]]:
    return [("first token", found.times.prefill), ("each other token", found.times.decode)]


def _parts(step: ServedStep) -> str:
    host = ", ".join(_named(name, ms) for name, ms in step.host.items() if ms)
    device = ", ".join(_named(name, ms) for name, ms in step.device.items() if ms)
    return f"the {step.bound_by} rules; host: {host}; device: {device} (ms)"


def _named(name: str, ms: float) -> str:
    return f"{name.replace('_', ' ')} {ms:.2f}"


def _room(found: Forecast) -> list[str]:
    memory, request = found.memory, found.request
    if memory.usable is None:
        return [f"how much memory a card of {found.target} has is not known: give --memory"]
    batch, longest = memory.largest_batch(request.context), memory.longest(request.batch)
    lines = [f"of the card the server takes {memory.usable / MIB:.0f} MiB"]
    if batch is not None:
        lines[0] += f": room for {batch} sequences of {request.context} tokens"
    if longest is not None:
        lines[0] += f", or {request.batch} of {longest}"
    return lines


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
