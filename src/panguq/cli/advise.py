"""`panguq advise`: which recipe should this model get, if any?"""

from __future__ import annotations

import argparse
from typing import Any

from panguq.cli.command import (
    Commands,
    add_command,
    add_json,
    counted,
    print_json,
    quiet_transformers,
    tokens,
)
from panguq.cli.explain_model import parse_memory

_TEXT = """\
Say which recipe a model should get on a device and a server, if any. Every built-in recipe with
what it means there: whether the server takes it, bytes, whether it fits the card, predicted times
of a request, compile time, and its loss on another, small model, since nothing is calibrated here
and only config.json is read. Then one recommendation and its reason; "none" is one, too.

Times are predictions (docs/cost-model.md), and only where a server's launch path was measured are
they its own; otherwise the answer says whose they are."""


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "advise",
        run,
        _TEXT,
        "panguq advise openpangu-7b --target ascend910b2 --server vllm-ascend --batch 8",
    )
    command.add_argument("folder", metavar="MODEL_DIR", help="a local model folder")
    command.add_argument(
        "--target",
        default="ascend910b1",
        help="ascend910b1 to b4, or a target file (default: ascend910b1)",
    )
    command.add_argument(
        "--server",
        metavar="NAME[==VERSION]",
        default="vllm-ascend",
        help="the server that is to run it (default: vllm-ascend)",
    )
    command.add_argument(
        "--mode", metavar="graph|eager", default="graph", help="its mode (default: graph)"
    )
    command.add_argument(
        "--memory", metavar="SIZE", help="a card's memory, as in 32GiB (default: the target's)"
    )
    command.add_argument("--batch", type=counted, default=1, help="sequences at once (default: 1)")
    command.add_argument("--prompt", type=tokens, default=1024, help="tokens (default: 1024)")
    command.add_argument("--new-tokens", type=tokens, default=256, help="tokens (default: 256)")
    add_json(command)


def run(options: argparse.Namespace) -> int:
    """Weigh and print."""
    quiet_transformers()
    from panguq.forecast.forecast import Request
    from panguq.planning.advice import advise

    found = advise(
        options.folder,
        options.target,
        options.server,
        options.mode,
        Request(options.batch, options.prompt, options.new_tokens),
        None if options.memory is None else parse_memory(options.memory),
    )
    if options.json:
        print_json(found.as_json())
    else:
        print(_render(found))
    return 0


def _render(found: Any) -> str:
    request = found.request
    head = ("recipe", "taken", "weights", "KV cache", "fits", "first ms", "token ms", "request s",
            "gain", "loss", "compile s")  # fmt: skip
    rows = [head]
    for row in found.recipes:
        loss = "float" if row.recipe == "float" else "?"
        if row.losses:
            loss = f"{row.losses[0].perplexity_percent:+.1f}%"
            loss = loss if row.losses[0].perplexity_percent < 1000 else "ruined"
        rows.append(
            (
                row.recipe,
                "yes" if row.takes else "no",
                _number(row.weights_mib),
                _number(row.kv_cache_mib),
                {True: "yes", False: "no", None: "?"}[row.fits],
                _number(row.ttft_ms, 1),
                _number(row.tpot_ms, 1),
                _number(row.request_s, 2),
                _number(row.gain_over_float, 2),
                loss,
                _number(row.compile_s),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        f"{found.target}, {found.server}: {request.batch} sequences, prompt {request.prompt}, "
        f"{request.new_tokens} new tokens (times predicted, of {found.times_of}; bytes in MiB; "
        "loss: perplexity of SmolLM2-135M above float)",
        "",
        *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows),
        "",
    ]
    reasons: dict[str, list[str]] = {}
    for row in found.recipes:
        if row.refused:
            reasons.setdefault(row.refused, []).append(row.recipe)
    lines += [f"not taken: {', '.join(names)}: {why}" for why, names in reasons.items()]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join([*lines, "", f"take {found.recipe}: {found.reason}"])


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
