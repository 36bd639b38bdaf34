"""Compare the cost model of Ascend targets with what is published; every error, good or bad.

    python -m bench.cost_model                            # print
    python -m bench.cost_model --docs docs/cost-model.md  # replace the figures in the page

Nothing runs on an NPU. The two constants fitted to W8A8 timings and the one fitted to W4A16 timings
are fitted anew and compared with those of the targets.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from bench.openpangu import CONFIGS, PROMPTS, prefill_gains
from bench.page import print_or_write
from bench.timings import (
    Timing,
    Tuned,
    fit,
    fit_vendor_dequantize,
    left_out,
    other_matmuls,
    predict,
    tuned_schedules,
    w4a16_timings,
    w8a8_timings,
    with_constants,
)
from bench.vendor_rules import rows as rule_rows
from bench.w4a16_gain import DEEP, Gain, deep, gains, spread
from panguq.lowering.targets import find_target

BEGIN, END = "<!-- figures: python -m bench.cost_model -->", "<!-- end of figures -->"
TOLERANCE = 0.15


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def error(predicted: float, measured: float) -> str:
    """The relative error in percent."""
    return f"{predicted / measured - 1:+.1%}"


def w8a8_section() -> list[str]:
    """The fit, each timing left out, and the faster schedule of each shape left out."""
    base, timings = find_target("ascend910b3"), w8a8_timings()
    found = fit(timings, base)
    target = found.target(base)
    rows, worst = [], 0.0
    for t in timings:
        alone = left_out(t, timings, base, shape=False).total_us
        shape = left_out(t, timings, base, shape=True).total_us
        worst = max(worst, abs(alone / t.us - 1), abs(shape / t.us - 1))
        fitted = predict(t, target).total_us
        cells = (f"{us:.1f} ({error(us, t.us)})" for us in (fitted, alone, shape))
        rows.append((f"{t.m}x{t.n}x{t.k}", t.splits, t.us, *cells))
    both = sum(predict(t, target).bound_by == "core_load" for t in timings)
    verdicts = [_faster(a, b) for a, b in zip(timings[::2], timings[1::2], strict=True)]
    constants = f"launch_us {found.launch_us:.2f}, core_load_bytes_per_cycle " + (
        f"{found.core_load_bytes_per_cycle:.1f}; the targets have {base['launch_us']} and "
        f"{base['core_load_bytes_per_cycle']}"
    )
    return [
        "### W8A8, data-parallel and Split-K, 910B3",
        "",
        f"Fitted to all eight: {constants}. {both} timings bear on both constants, the rest on the "
        "launch alone.",
        "",
        *table(
            (
                "m x n x k",
                "splits",
                "published us",
                "fitted to all",
                "this row left out",
                "this shape left out",
            ),
            rows,
        ),
        "",
        f"Largest error of a left-out prediction: {worst:.1%} (aim: {TOLERANCE:.0%}). The faster "
        f"schedule, predicted from the other shapes: {sum(verdicts)} of {len(verdicts)} right.",
    ]


def _faster(whole: Timing, split: Timing) -> bool:
    """Whether the faster schedule of a shape is predicted from the other shapes."""
    base, timings = find_target("ascend910b3"), w8a8_timings()
    whole_us, split_us = (left_out(t, timings, base, shape=True).total_us for t in (whole, split))
    return (whole_us < split_us) == (whole.us < split.us)


def tuned_section() -> list[str]:
    """CANN's tuned tilings."""
    lines = [
        "### Shapes that CANN's tuned tilings do not divide along k",
        "",
        "The cheapest schedule without Split-K against the cheapest Split-K over tiles and splits, "
        "with one launch. CANN's W8A8 tilings never divide k. Servers store W8A8 weights in NZ "
        "format; what the tilings were tuned for is not part of the figures, so both are shown.",
        "",
    ]
    rows = []
    for weights in ("NZ", "ND"):
        found = [t for t in tuned_schedules(weights) if t.problem.dtype != "float32"]
        wrong = [t for t in found if t.predicted != t.schedule]
        right = f"{len(found) - len(wrong)} of {len(found)}"
        rows.append((f"W8A8, {weights} weights", "data-parallel", right, _listed(wrong)))
    for schedule, name in (("data_parallel", "data-parallel"), ("split_k", "Split-K")):
        tuned = tuned_schedules()
        found = [t for t in tuned if t.problem.dtype == "float32" and t.schedule == schedule]
        wrong = [t for t in found if t.predicted != t.schedule]
        rows.append(
            ("float32, 910B2", name, f"{len(found) - len(wrong)} of {len(found)}", _listed(wrong))
        )
    lines += table(
        ("matmuls", "CANN's tiling", "model agrees", "where not: without, with Split-K"), rows
    )
    return [
        *lines,
        "",
        "So a rule that always divides k fails on the W8A8 rows. For float32 the model never "
        "divides k where CANN does: it takes the published start of vector cores (1 us + 7 us for "
        "a full wave) as it is, and no timing here tests it for a kernel that would otherwise run "
        "on cube cores alone. panguq has no float32 kernel of its own, so no choice depends on it.",
    ]


def _listed(wrong: Sequence[Tuned]) -> str:
    return "; ".join(
        f"{t.target[6:]} {t.problem.m}x{t.problem.n}x{t.problem.k}: "
        f"{t.whole_us:.1f}, {t.split_us:.1f} us"
        for t in wrong
    )


def other_section() -> list[str]:
    """Timings that nothing is fitted to."""
    rows, errors = [], []
    for row, found in other_matmuls():
        us = float(row["us"])
        errors.append(abs(found.total_us / us - 1))
        shape = f"{row['m']}x{row['n']}x{row['k']}"
        cells = (row["dtype"], row["tile"], row["weight"], us, f"{found.total_us:.1f}")
        rows.append((shape, *cells, error(found.total_us, us), found.bound_by))
    return [
        "### Other published timings, not fitted to",
        "",
        *table(
            (
                "m x n x k",
                "dtype",
                "tile",
                "weight",
                "published us",
                "predicted",
                "error",
                "bound by",
            ),
            rows,
        ),
        "",
        f"Median error {statistics.median(errors):.0%}, largest {max(errors):.0%}.",
    ]


def w4a16_section() -> list[str]:
    """The third party's W4A16 timings."""
    base, timings = find_target("ascend910b1"), w4a16_timings()
    name = "vendor_dequantize_bytes_per_cycle"
    rate = fit_vendor_dequantize(timings, base)
    target = with_constants(base, **{name: rate})
    rows = []
    for t in timings:
        found = t.predict(target)
        rest = [other for other in timings if other != t]
        fits = found.how.startswith("dequantize")
        alone = (
            with_constants(base, **{name: fit_vendor_dequantize(rest, base)}) if fits else target
        )
        left = t.predict(alone).total_us
        shown = f"{left:.1f} ({error(left, t.us)})"
        cells = (t.us, f"{found.total_us:.1f} ({error(found.total_us, t.us)})", shown)
        rows.append((f"{t.m}x{t.n}x{t.k}", t.group_size, *cells, found.how.partition(",")[0]))
    return [
        "### W4A16 by CANN, 910B1, m = 1",
        "",
        f"{name} fitted to the two timings of group 32: {rate:.2f}; the targets have {base[name]}. "
        "The timing of group 128 is not fitted to: CANN multiplies integers there.",
        "",
        *table(
            (
                "m x n x k",
                "group",
                "published us",
                "predicted",
                "this row left out",
                "CANN's kernel",
            ),
            rows,
        ),
        "",
        "One constant cannot give both timings of group 32: less the launch, the deep shape takes "
        "1.8 times as long for each weight. Nothing is claimed for W4A16 beyond m = 1.",
    ]


def gain_section() -> list[str]:
    """Predicted gains of W4A16 kernels."""
    target = find_target("ascend910b1")
    rows = []
    native = with_constants(target, dequantize_instructions=3)
    for name, where, two_phase in (
        ("two-phase, 10 instructions a vector of weights", target, True),
        ("two-phase, 3 instructions", native, True),
        ("panguq's", target, False),
    ):
        found = gains(where, two_phase)
        for which, part in (("all", found), (f"k >= {DEEP} n", deep(found))):
            rows.append((name, f"{which} ({len(part)})", *_gains(part)))
    return [
        "### Predicted gain of W4A16 kernels, 910B1, group 128, float16",
        "",
        "Minimum / median / maximum over `bench/data/w4a16_grid.csv`, m = 1, 4, 16, 64. Nothing is "
        "fitted to these; no timing of either kernel is used. panguq's kernel takes 3 vector "
        "instructions for a vector of weights in float16, counted in what the NPU's compiler makes "
        "of it; Ascend C casts int4 to float16 in one, so 3 would do for the other, too (cast, "
        "offset, scale).",
        "",
        *table(("kernel", "shapes", "Split-K over data-parallel", "over float16"), rows),
        "| published (He et al., arXiv 2601.16536) | K >> N | 1.01 to 1.74 | at most 1.48 |",
    ]


def _gains(found: Sequence[Gain]) -> tuple[str, str]:
    over = [gain.over_data_parallel for gain in found]
    return spread(over), spread([gain.over_float for gain in found])


def model_section() -> list[str]:
    """Predicted gain of openPangu's prefill, beside what is published."""
    rows = []
    for name in CONFIGS:
        for weights in ("ND", "NZ"):
            for target in ("ascend910b1", "ascend910b3"):
                found = prefill_gains(name, target, weights)
                cells = (f"{gain:.2f}" for gain in found.values())
                rows.append((f"openPangu {name}", target[6:], weights, *cells, "1.5"))
    return [
        "### Predicted W8A8 gain over float16 for openPangu, whole model, one sequence",
        "",
        "The published figure (Luo et al., Post-Training Quantization of OpenPangu Models, 2025; "
        "Atlas A2, prefill) comes, in the abstract, without prompt length and serving software; "
        "nothing is fitted to it. NZ is what servers store, ND what panguq's graphs store.",
        "",
        *table(
            ("model", "target", "weights", *(f"prefill {p}" for p in PROMPTS), "published"), rows
        ),
    ]


def rules_section() -> list[str]:
    """The vendor's rules beside the model."""
    lines = ["### Vendor rules for openPangu's matmuls, float16", ""]
    rows = []
    for name in ("ascend910b1", "ascend910b3"):
        found = rule_rows(find_target(name))
        agrees = sum(row.agrees for row in found)
        plain = sum(row.agrees_with_cann for row in found)
        lines.append(
            f"- {name}: the model agrees with CATLASS' rule for {agrees} of {len(found)} and with "
            f"CANN's, which never divides k here, for {plain}."
        )
        rows += [
            (name[6:], f"{r.name} ({r.n}x{r.k})", r.m, r.catlass, r.predicted, r.why(), r.w8a8)
            for r in found
            if not (r.agrees and r.agrees_with_cann)
        ]
    head = ("target", "matmul (n x k)", "m", "CATLASS", "model", "why", "panguq's W8A8 kernel")
    text = "Every disagreement (CANN's rule says data_parallel in all of these):"
    return [*lines, "", text, "", *table(head, rows)]


def figures() -> str:
    """All sections."""
    sections = (
        w8a8_section(),
        other_section(),
        tuned_section(),
        w4a16_section(),
        gain_section(),
        model_section(),
        rules_section(),
    )
    return "\n\n".join("\n".join(lines) for lines in sections)


def main() -> None:
    """Print, or write into the page."""
    print_or_write(__doc__.split("\n")[0], figures, BEGIN, END)


if __name__ == "__main__":
    main()
