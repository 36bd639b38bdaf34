"""Serve folders with vLLM on a CPU and say what comes out: vllm_serve.py FOLDER ...

Run in vLLM's environment, which has no panguq. FOLDER/checkpoint is served in bfloat16;
FOLDER/reference.safetensors holds the windows `ids` `[windows, tokens]`. Prints a JSON object a
folder: the kernels of its linears, and the perplexity over the windows.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams


def main() -> None:
    """Serve one folder after another and print."""
    # AMX's kernel of 4-bit weights ends with an illegal instruction on some machines that say they
    # have it; the plain vector kernel computes what the folder says.
    torch.cpu._is_amx_tile_supported = lambda: False
    for folder in map(Path, sys.argv[1:]):
        try:
            said = serve(folder)
        except Exception as error:  # whatever a server raises is the answer
            said = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print("RESULT " + json.dumps({"folder": folder.name, **said}), flush=True)
        gc.collect()


def serve(folder: Path) -> dict[str, Any]:
    """The kernels and the perplexity of one folder."""
    ids = load_file(folder / "reference.safetensors")["ids"]
    llm = LLM(
        model=str(folder / "checkpoint"), dtype="bfloat16", skip_tokenizer_init=True,
        enforce_eager=True, max_model_len=2 * ids.shape[1], max_num_seqs=4,
        enable_prefix_caching=False,
        logprobs_mode="raw_logprobs", kv_cache_memory_bytes=256 << 20,
    )  # fmt: skip
    worker = llm.llm_engine.model_executor.driver_worker
    model = getattr(worker, "worker", worker).get_model()
    kernels: Counter[str] = Counter()
    for module in model.modules():
        scheme = getattr(module, "scheme", None)
        if scheme is not None:
            kernel = getattr(scheme, "kernel", None)
            kernels[type(scheme if kernel is None else kernel).__name__] += 1
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": row.tolist()} for row in ids]
    lost, count = 0.0, 0
    for row, answer in zip(ids, llm.generate(prompts, asked, use_tqdm=False), strict=True):
        for token, given in zip(row[1:].tolist(), answer.prompt_logprobs[1:], strict=True):
            lost -= given[token].logprob
            count += 1
    return {"kernels": dict(kernels), "perplexity": math.exp(lost / count)}


if __name__ == "__main__":
    main()
