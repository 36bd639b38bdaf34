"""What one token costs by the length of the past and the number of sequences.

    python -m bench.decoding MODEL_DIR [--past 128 1024 4096] [--batch 1 8 32]

MODEL_DIR is a compiled model. Printed are milliseconds of CPU time of one thread, the median of
some steps and their range; all pasts take turns. Sequences of a batch are padded on the left by
different lengths.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

import panguq
from panguq.compiled_causal_lm import CompiledCausalLM
from panguq.ir.kv_cache import CACHE_NAME, cache_of

STEPS = 8
WARM_UP = 2
BATCH_PAST = 128


def decoder(model: CompiledCausalLM, past: int, batch: int) -> Callable[[], object]:
    """A function that decodes one more token of each of `batch` sequences behind `past` tokens."""
    generator = torch.Generator().manual_seed(0)
    high = model.interface.vocab_size or 2
    ids = torch.randint(0, high, (batch, past), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : row % past] = 0
    token = ids[:, -1:]
    cache = cache_of(model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1))

    def step() -> object:
        nonlocal mask
        mask = torch.cat((mask, torch.ones_like(token)), dim=1)
        positions = mask.sum(1, keepdim=True) - 1
        return model(token, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})

    return step


def measure(decoders: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of CPU time of each decoder's steps, all taking turns."""
    found: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(WARM_UP + STEPS):
        for name, step in decoders.items():
            start = time.process_time()
            step()
            if turn >= WARM_UP:
                found[name].append((time.process_time() - start) * 1e3)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.decoding", description=__doc__)
    parser.add_argument("model", help="a folder that compiled.save wrote")
    parser.add_argument("--past", nargs="+", type=int, default=[128, 1024, 4096])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = panguq.load(options.model)
    if not isinstance(model, CompiledCausalLM):
        parser.error(f"{options.model} holds no causal language model")
    decoders = {f"past {past}": decoder(model, past, 1) for past in options.past}
    decoders |= {
        f"past {BATCH_PAST}, {batch} sequences": decoder(model, BATCH_PAST, batch)
        for batch in options.batch
    }
    for name, ms in measure(decoders).items():
        print(f"{name:28s} {statistics.median(ms):7.1f} ms ({min(ms):.1f}-{max(ms):.1f})")


if __name__ == "__main__":
    main()
