"""A model's predictions for a reader, the published figure beside them."""

from __future__ import annotations

from panguq.explain.model import ModelExplanation

PUBLISHED = (
    "Published for openPangu-Embedded 1B and 7B, W8A8 on Atlas A2: 1.5 times the float16 prefill "
    "speed (Luo et al., Post-Training Quantization of OpenPangu Models, 2025). The abstract gives "
    "neither prompt length nor serving software; nothing here is fitted to it."
)


def render(found: ModelExplanation) -> str:
    """The predictions for a reader."""
    head = (
        "matmul",
        "count",
        "n",
        "k",
        "scheme",
        "prefill us",
        "float",
        "decode us",
        "float",
        "decode kernel",
    )
    rows: list[tuple[str, ...]] = [head]
    for row in found.matmuls:
        times = (row.prefill_us, row.float_prefill_us, row.decode_us, row.float_decode_us)
        cells = (row.example, row.count, row.n, row.k, row.scheme, *(f"{us:.1f}" for us in times))
        rows.append((*map(str, cells), row.decode_kernel))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    table = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    lines = [
        f"{found.scheme} on {found.target}, {found.dtype}, batch {found.batch}, weights in "
        f"{found.weight_format} format (predicted)"
    ]
    lines += ["", *table, ""]
    for name, phase in (("prefill", found.prefill), ("decode step", found.decode)):
        lines.append(
            f"{name} of {phase.tokens} tokens: {phase.us / 1000:.2f} ms against "
            f"{phase.float_us / 1000:.2f} ms in {found.dtype}, {phase.gain:.2f} times as fast; "
            f"all but matmuls {phase.other_us / 1000:.2f} ms; "
            f"critical path {phase.critical_path_us / 1000:.2f} ms"
        )
    lines.append(
        f"weights: {found.weight_bytes / 2**30:.2f} GiB against "
        f"{found.float_weight_bytes / 2**30:.2f} GiB"
    )
    lines += [f"{row.example}: {row.note}" for row in found.matmuls if row.note]
    path = found.prefill.critical_path
    shown = " > ".join(path[:8]) + (f" > … ({len(path)} in all)" if len(path) > 8 else "")
    lines += ["", f"critical path of the prefill: {shown}"]
    if found.scheme.startswith("W8A8"):
        lines += ["", PUBLISHED]
    return "\n".join(lines)
