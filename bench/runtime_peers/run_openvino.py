"""Measure OpenVINO GenAI: FILE.gguf, THREADS. Runs in its own environment.

Its pipeline without a scheduler, which has no prefix cache.
"""

from __future__ import annotations

import sys

import numpy as np
import openvino
import openvino_genai

from bench.runtime_peers.serve import serve


def main() -> None:
    """Load and serve."""
    file, threads = sys.argv[1], int(sys.argv[2])
    pipeline = openvino_genai.LLMPipeline(
        file, "CPU", INFERENCE_NUM_THREADS=threads, ATTENTION_BACKEND="SDPA"
    )

    def generate(tokens: list[int], new: int) -> None:
        ids = openvino.Tensor(np.array([tokens], dtype=np.int64))
        mask = openvino.Tensor(np.ones((1, len(tokens)), dtype=np.int64))
        pipeline.generate(
            openvino_genai.TokenizedInputs(ids, mask),
            openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False),
        )

    serve(generate)


if __name__ == "__main__":
    main()
