"""The forecast of whole models against published latencies, and the launch path fitted to them.

    python -m bench.model_cost                           # print the fit and every group's errors
    python -m bench.model_cost --docs docs/cost-model.md # replace the figures in the page

Fitted to openPangu-Embedded-1B alone: microseconds of a decoding step and of a prompt for each
layer, of a second sequence, and of each further one. Everything else is published elsewhere.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from bench.openpangu import FULL_LAYERS
from bench.openpangu import config as openpangu_config
from bench.page import print_or_write
from bench.timings import read
from panguq.cli.command import quiet_transformers
from panguq.forecast.forecast import Request, forecast
from panguq.forecast.graph import graph_of
from panguq.forecast.launch_paths import LaunchPath, find_launch_path
from panguq.lowering.targets import find_target

BEGIN, END = "<!-- figures: python -m bench.model_cost -->", "<!-- end of model figures -->"
FITTED = ("layer_us", "prompt_layer_us", "batch_us", "sequence_us")
SERVER, TARGET = "vllm-ascend==0.9.2", "ascend910b2"


@dataclass(frozen=True)
class Latency:
    """A published latency of openPangu-Embedded-1B: seconds for one batch of requests."""

    log: str
    scheme: str
    mode: str
    request: Request
    seconds: float


def latencies() -> list[Latency]:
    """All of bench/data/openpangu_1b_latency.csv."""
    return [
        Latency(
            row["log"],
            row["scheme"],
            row["mode"],
            Request(int(row["batch"]), int(row["prompt"]), int(row["new_tokens"])),
            float(row["seconds"]),
        )
        for row in read("openpangu_1b_latency.csv")
    ]


@functools.cache
def graph(name: str, scheme: str) -> Any:
    """The graph of a model of which only the sizes are known."""
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        sizes = openpangu_config(name) | {"num_hidden_layers": FULL_LAYERS[name]}
        (Path(folder) / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
        return graph_of(folder, scheme, "bfloat16")


@functools.cache
def device_ms(scheme: str, request: Request) -> tuple[float, float, int]:
    """The device's part of a prompt and of a decoding step, and how many kernels quantize."""
    path = replace(find_launch_path(SERVER), layer_us=0.0, prompt_layer_us=0.0, batch_us=0.0,
                   sequence_us=0.0, quantize_us=1000.0)  # fmt: skip
    gm, interface = graph("1B", scheme)
    found = forecast(gm, interface, find_target(TARGET), path, request, scheme=scheme)
    quantizers = round(found.times.decode.host_ms)
    return found.times.prefill.device_ms, found.times.decode.device_ms, quantizers


def predicted_s(row: Latency, fitted: Mapping[str, float], path: LaunchPath) -> float:
    """Seconds of a request with these numbers in place of the path's own."""
    used = replace(path, **fitted)
    if row.mode == "eager":  # where decoding and prompts go the same way
        used = replace(used, layer_us=used.prompt_layer_us)
    layers, request = FULL_LAYERS["1B"], row.request
    prefill, decode, quantizers = device_ms(row.scheme, request)
    tokens = request.batch * request.prompt
    prompt_host = sum(used.prompt(layers, used.layer_kernels, quantizers, tokens).values())
    host = sum(used.decode(layers, used.layer_kernels, quantizers, request.batch).values())
    steps = request.new_tokens - 1
    return (max(prefill, prompt_host / 1000) + steps * max(decode, host / 1000)) / 1000


def fit(rows: Sequence[Latency]) -> dict[str, float]:
    """The numbers of least squared relative error."""
    path = find_launch_path(SERVER)

    def errors(values: Any) -> Any:
        given = dict(zip(FITTED, values, strict=True))
        return [np.log(predicted_s(row, given, path) / row.seconds) for row in rows]

    start = [getattr(path, name) for name in FITTED]
    found = least_squares(errors, start, x_scale=np.maximum(start, 1.0), bounds=(0, np.inf))
    return dict(zip(FITTED, map(float, found.x), strict=True))


def stored() -> dict[str, float]:
    """The numbers that panguq has."""
    path = find_launch_path(SERVER)
    return {name: getattr(path, name) for name in FITTED}


def relative_errors(rows: Sequence[Latency], fitted: Mapping[str, float]) -> Any:
    """Predicted over published, less one."""
    path = find_launch_path(SERVER)
    return np.array([predicted_s(row, fitted, path) / row.seconds - 1 for row in rows])


def figures() -> str:
    """The fit, and errors by kind of row."""
    rows = latencies()
    found, has = fit(rows), stored()
    lines = [
        "Fitted to all rows: "
        + ", ".join(f"{name} {found[name]:.0f}" for name in FITTED)
        + "; panguq has "
        + ", ".join(f"{has[name]:g}" for name in FITTED)
        + ".",
        "",
        "| rows | number | median error | 90 % below | largest | bias |",
        "|---|---|---|---|---|---|",
    ]
    for what, chosen in groups(rows).items():
        errors = relative_errors(chosen, has)
        size = np.abs(errors)
        lines.append(
            f"| {what} | {len(chosen)} | {np.median(size):.1%} | {np.quantile(size, 0.9):.1%} | "
            f"{size.max():.1%} | {np.median(errors):+.1%} |"
        )
    left = np.concatenate(
        [
            relative_errors(chosen, fit([row for row in rows if row not in chosen]))
            for chosen in by_size(rows)
        ]
    )
    size = np.abs(left)
    lines.append(
        f"| each batch and prompt from all others | {len(size)} | {np.median(size):.1%} | "
        f"{np.quantile(size, 0.9):.1%} | {size.max():.1%} | {np.median(left):+.1%} |"
    )
    lines += ["", *_gain_lines(rows, has)]
    return "\n".join(lines)


def groups(rows: Sequence[Latency]) -> dict[str, list[Latency]]:
    """The rows by what was asked for."""
    sweep = [row for row in rows if row.request.prompt <= 1024 and row.mode == "graph"]
    found = {
        f"bfloat16, batch {batch}, prompts to 1024": [
            row for row in sweep if row.request.batch == batch
        ]
        for batch in (1, 2, 4, 8)
    }
    found["bfloat16, eager"] = [row for row in rows if row.mode == "eager"]
    found["bfloat16, prompt 4096"] = [
        row for row in rows if row.request.prompt == 4096 and row.scheme == "FLOAT"
    ]
    found["W8A8, prompt 4096"] = [row for row in rows if row.scheme == "W8A8"]
    found["bfloat16, prompt 16384"] = [row for row in rows if row.request.prompt == 16384]
    found["all"] = list(rows)
    return found


def by_size(rows: Sequence[Latency]) -> list[list[Latency]]:
    """The rows of each batch and prompt; the two eager rows, of which one constant is, stay."""
    found: dict[tuple[int, int], list[Latency]] = {}
    for row in rows:
        if row.mode == "graph":
            found.setdefault((row.request.batch, row.request.prompt), []).append(row)
    return list(found.values())


def _gain_lines(rows: Sequence[Latency], has: Mapping[str, float]) -> list[str]:
    path = find_launch_path(SERVER)
    chosen = groups(rows)
    parts = [chosen[name] for name in ("bfloat16, prompt 4096", "W8A8, prompt 4096")]
    published = [np.mean([row.seconds for row in part]) for part in parts]
    predicted = [predicted_s(part[0], has, path) for part in parts]
    return [
        f"W8A8 over bfloat16, prompt 4096 and 32 new tokens: published "
        f"{published[0] / published[1]:.2f} (two runs of each), predicted "
        f"{predicted[0] / predicted[1]:.2f}."
    ]


def main() -> None:
    """Print, or write into the page."""
    print_or_write(__doc__.split("\n")[0], figures, BEGIN, END)


if __name__ == "__main__":
    main()
