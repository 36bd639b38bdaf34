"""Measure llama.cpp: FILE.gguf, THREADS. Runs in its own environment."""

from __future__ import annotations

import sys

from llama_cpp import Llama

from bench.runtime_peers.serve import serve


def main() -> None:
    """Load and serve."""
    file, threads = sys.argv[1], int(sys.argv[2])
    model = Llama(
        file, n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip

    def generate(tokens: list[int], new: int) -> None:
        model.reset()
        model.eval(tokens)
        for _ in range(new - 1):
            model.eval([model.sample(temp=0.0)])

    serve(generate)


if __name__ == "__main__":
    main()
