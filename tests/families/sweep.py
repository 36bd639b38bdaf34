"""What panguq does with every family: `make test-families`, which holds docs/models.md to it.

Each family has a process of its own, two at a time. A stage that gives a wrong result fails the
sweep; what panguq refuses is written down in its own words.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import panguq
from panguq.errors import PanguqError, TraceError
from panguq.explain.graph_ops import compiled_times
from panguq.ir.analysis.channels import find_scale_sites
from panguq.ir.edit import op_name
from panguq.lowering.targets import find_target
from tests.families.encoders import ENCODERS
from tests.families.models import FAMILIES, VOCAB, WINDOW, make
from tests.shared_traces import shared_traces

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- sweep -->", "<!-- end of sweep -->"
COLUMNS = ("family", "smoothing sites", "W8A8", "W4A16", "fused on Ascend", "servers' formats")
LARGEST_DIFFERENCE = 1e-4  # of the largest logit
LEAST_SQNR_DB = 10.0  # of a random model's logits in 8 bits; a wrong graph has less than 3
FUSED = {
    "npu_fused_infer_attention_score": "attention",
    "latent_attention": "latent attention",
    "npu_geglu": "geglu",
    "npu_rms_norm": "norm",
    "npu_add_rms_norm": "norm",
    "npu_rotary_mul": "rotary",
    "npu_swiglu": "swiglu",
}
TARGET = "ascend910b1"


def token_ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random ids `[batch, tokens]` without the padding token 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, tokens), generator=generator)


IDS, LONG = token_ids(2, 7), token_ids(2, WINDOW + 8, seed=1)
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
CALIBRATION = [token_ids(2, 14, seed) for seed in (2, 3)]
GREEDY = dict(max_new_tokens=WINDOW + 4, do_sample=False)


def difference(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, of the largest expected value."""
    assert expected.shape == actual.shape
    return float((expected - actual).abs().max() / expected.abs().max())


def check_float(model: Any, compiled: Any) -> None:
    """The float compile is the model: a prompt beyond the window, padding, a past, generation."""
    with torch.no_grad():
        expected = model(LONG).logits
        assert difference(expected, compiled(LONG).logits) <= LARGEST_DIFFERENCE, "a prompt"
        past = compiled(LONG[:, :11], use_cache=True)
        cache = past.get("cache", past.get("past_key_values"))
        rest = compiled(LONG[:, 11:], past_key_values=cache).logits
        assert difference(expected[:, 11:], rest) <= LARGEST_DIFFERENCE, "tokens after a past"
        padded, real = model(IDS, attention_mask=MASK).logits, MASK.bool()
        found = compiled(IDS, attention_mask=MASK).logits
        assert difference(padded[real], found[real]) <= LARGEST_DIFFERENCE, "a padded prompt"
    for mask in (torch.ones_like(MASK), MASK):
        pair = [m.generate(IDS, attention_mask=mask, **GREEDY) for m in (model, compiled)]
        assert torch.equal(*pair), "generation"


def quantized(model: Any, compiled: Any, least_db: float = LEAST_SQNR_DB) -> str:
    """`14 of 15`: how many matmuls are quantized. The logits are near the float model's."""
    with torch.no_grad():
        expected, actual = model(IDS).logits.double(), compiled(IDS).logits.double()
    noise = (expected - actual).square().mean() / expected.square().mean()
    decibels = float(-10 * torch.log10(noise))
    assert decibels >= least_db, f"{compiled.recipe.name} has {decibels:.1f} dB"
    matmuls = [m for m in compiled.report.matmuls if not m.is_side]
    count = sum(m.scheme != "FLOAT" for m in matmuls)
    assert count > 0, "nothing is quantized"
    return f"{count} of {len(matmuls)}"


def sites(compiled: Any) -> str:
    """`5 norm_linear, 2 value_output`: in the graph that passes see, before it is lowered."""
    found, _ = find_scale_sites(compiled.stages["fake-quant"], compiled.interface)
    counts = Counter(site.kind for site in found)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "none"


def fused(compiled: Any) -> str:
    """`2 attention, 5 norm`: calls of the vendor's fused ops."""
    names = (op_name(n) for n in compiled.graph.graph.nodes if n.op == "call_function")
    counts = Counter(FUSED[name] for name in names if name in FUSED)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())) or "none"


def saved(compiled: Any, format: str) -> str:
    """Nothing where this format takes the model, or why not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled.save(Path(folder) / "saved", format=format)
        except PanguqError as error:
            return f"no {format}: {said(error)}"
        return format


def loads_alike(compiled: Any) -> None:
    """The model that is saved and loaded gives the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "saved")
        loaded = panguq.load(Path(folder) / "saved")
        assert torch.equal(loaded(IDS).logits, compiled(IDS).logits), "the loaded model"


def every_op_has_a_price(lowered: Any) -> None:
    """Of a prompt's kernels and of a decoding step's."""
    for times in compiled_times(lowered, find_target("ascend910b2"), 2, 64).values():
        assert not times.unpriced, f"without a price: {set(times.unpriced.values())}"


def said(error: PanguqError) -> str:
    """A message as it stands in the table, the same in every release of the libraries below."""
    return re.sub(r"\s+", " ", error.message).replace("|", "\\|")[:200]


def row(family: str) -> tuple[str, ...]:
    """The family's row of the table. Raises AssertionError for a wrong result."""
    model = make(family)
    with shared_traces():
        try:
            compiled: Any = panguq.compile(model, "float")
        except TraceError as error:
            return (family, f"refused: {said(error)}")
        check_float(model, compiled)
        dynamic = panguq.compile(model, "w8a8-dynamic", calibration=CALIBRATION)
        gptq = panguq.compile(model, "w4a16-gptq", calibration=CALIBRATION)
        recipe = "w8a8-dynamic-serving"
        lowered = panguq.compile(model, recipe, calibration=CALIBRATION, target=TARGET)
    loads_alike(gptq)
    every_op_has_a_price(lowered)
    formats = (saved(gptq, "compressed-tensors"), saved(lowered, "ascend"))
    quantized(model, lowered)
    counts = (quantized(model, dynamic), quantized(model, gptq, least_db=3.0))
    return (family, sites(compiled), *counts, fused(lowered), "; ".join(formats))


def _row_or_fault(family: str) -> tuple[tuple[str, ...], str, float]:
    """The row, what is wrong if something is, and the CPU seconds."""
    torch.set_num_threads(1)
    logging.getLogger("panguq").setLevel(logging.ERROR)
    start = time.process_time()
    from tests.families.encoder_sweep import encoder_row  # which takes its parts from here

    try:
        cells = encoder_row(family) if family in ENCODERS else row(family)
        return cells, "", time.process_time() - start
    except Exception as error:
        return (family,), f"{type(error).__name__}: {error}", time.process_time() - start


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown: the language models that compile, models without a cache, what is refused."""
    served = [r for r in rows if len(r) == len(COLUMNS)]
    parts = [
        [(what, *COLUMNS[1:]), ("---",) * len(COLUMNS), *some]
        for what, some in (
            ("family", [r for r in served if r[0] not in ENCODERS]),
            ("class", [r for r in served if r[0] in ENCODERS]),
        )
    ]
    refused = [r for r in rows if len(r) == 2]
    lines_refused = [("family", "what panguq says"), ("---", "---"), *refused]
    texts = (["| " + " | ".join(cells) + " |" for cells in p] for p in (*parts, lines_refused))
    return "\n\n".join("\n".join(text) for text in texts)


def page_table() -> str:
    """The table that docs/models.md holds."""
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def main() -> None:
    """Run the sweep; exit with 1 for a wrong result, or where docs/models.md says otherwise."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("families", nargs="*", help="these alone, and no look at docs/models.md")
    parser.add_argument("--update", action="store_true", help="write docs/models.md")
    given = parser.parse_args()
    families = given.families or [*FAMILIES, *ENCODERS]
    rows, faults = [], []
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        run: Callable[..., Any] = pool.imap
        for cells, fault, seconds in run(_row_or_fault, families, chunksize=1):
            print(f"{seconds:5.1f} s  {fault or ' | '.join(cells)}  [{cells[0]}]", flush=True)
            rows.append(cells)
            if fault:
                faults.append(f"{cells[0]}: {fault}")
    if faults:
        sys.exit("\n".join(["wrong:", *faults]))
    if given.families:
        return
    if given.update:
        text = PAGE.read_text(encoding="utf-8")
        head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        PAGE.write_text(f"{head}\n\n{table(rows)}\n\n{tail}", encoding="utf-8")
    elif page_table() != table(rows):
        sys.exit(f"{PAGE.name} is out of step; write it with make test-families ARGS=--update")


if __name__ == "__main__":
    main()
