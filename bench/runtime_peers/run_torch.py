"""Measure a model of transformers or a compiled one: FOLDER, DTYPE (or "compiled"), THREADS."""

from __future__ import annotations

import sys
from typing import Any

import torch

import panguq
from bench.runtime_peers.serve import serve
from panguq.ir.kv_cache import CACHE_NAME, cache_of


def main() -> None:
    """Load and serve."""
    folder, kind, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    model: Any
    if kind == "compiled":
        model = panguq.load(folder)
    else:
        model = panguq.load_pretrained(folder).to(getattr(torch, kind)).eval()

    def generate(tokens: list[int], new: int) -> None:
        output = model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        for _ in range(new - 1):
            step = output.logits[:, -1:].argmax(-1)
            output = model(step, **{CACHE_NAME: cache_of(output)}, use_cache=True)

    serve(generate)


if __name__ == "__main__":
    main()
