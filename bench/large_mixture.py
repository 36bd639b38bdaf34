"""Compile a mixture of experts larger than the memory it may use: Qwen3-30B-A3B's layer shapes.

    python -m bench.large_mixture --layers 4 --recipes w8a8-dynamic w4a16-gptq

Weights are random bfloat16 under the published names: a tensor for each expert's gate, up and down
projection, of 128 experts a layer. Each recipe compiles twice, watched and limited as
`bench.large_model` does it: once killed with SIGKILL, when about half of its parts are there, and
started again; and once from end to end. Both must save the same bytes, in every file but the
report, which tells seconds. What the dry run foretold is printed below what was measured.

The calibration data are few: 4 windows of 128 tokens, of which each expert gets 32, since a token
meets 8 of 128 experts. That is below the 128 tokens from which an expert is calibrated on its own,
so all of them are calibrated on all tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.large_model import (
    GIB,
    Measured,
    Part,
    compile_limited,
    folder_gib,
    normal,
    panguq_compile,
    write_folder,
)

QWEN3_30B_A3B: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
HIDDEN, FFN, EXPERTS, HEADS, SHARED_HEADS, HEAD = 2048, 768, 128, 32, 4, 128
UNITS_OF_LAYER = {"w8a8-dynamic": 6, "w4a16-gptq": 2 * EXPERTS + 2}
"""Parts that a compile keeps of a layer, by recipe: its weights' codes."""


def make_mixture(path: Path, layers: int) -> Path:
    """A checkpoint folder as published, one shard a layer."""
    parts: list[Part] = [_ends, *(partial(_layer, index) for index in range(layers))]
    return write_folder(path, QWEN3_30B_A3B | {"num_hidden_layers": layers}, parts)


def _ends(generator: torch.Generator) -> dict[str, Tensor]:
    rows = int(str(QWEN3_30B_A3B["vocab_size"]))
    names = ("model.embed_tokens.weight", "lm_head.weight")
    weights = {name: normal(generator, rows, HIDDEN, scale=HIDDEN**-0.5) for name in names}
    return weights | {"model.norm.weight": 1 + normal(generator, HIDDEN, scale=0.3)}


def _layer(index: int, generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (SHARED_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (SHARED_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        shapes[f"mlp.experts.{expert}.gate_proj"] = (FFN, HIDDEN)
        shapes[f"mlp.experts.{expert}.up_proj"] = (FFN, HIDDEN)
        shapes[f"mlp.experts.{expert}.down_proj"] = (HIDDEN, FFN)
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    norms |= {"self_attn.q_norm": HEAD, "self_attn.k_norm": HEAD}
    layer = f"model.layers.{index}"
    weights = {
        f"{layer}.{name}.weight": normal(generator, n, k, scale=k**-0.5)
        for name, (n, k) in shapes.items()
    }
    return weights | {
        f"{layer}.{name}.weight": 1 + normal(generator, n, scale=0.3) for name, n in norms.items()
    }


def kept_parts(out: Path) -> int:
    """How many parts of the compile into `out` are finished."""
    return sum(1 for _ in (out.parent / f".{out.name}.work" / "units").rglob("facts.json"))


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two saved models have the same files, but for the report and what sums it up."""
    names = {path.name for path in one.iterdir()}
    told = {"report.json", "manifest.json"}
    return names == {path.name for path in other.iterdir()} and not any(
        _differ(one / name, other / name) for name in names - told
    )


def _differ(one: Path, other: Path) -> bool:
    size = 16 << 20
    with one.open("rb") as left, other.open("rb") as right:
        while block := left.read(size):
            if block != right.read(size):
                return True
        return bool(right.read(1))


def foretold(model: Path, recipe: str) -> str:
    """The dry run's figures of memory, disk and time."""
    command = [*panguq_compile(model, recipe), "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    return (
        f"plan: {plan['compile_seconds']:.0f} s, {plan['peak_bytes'] / GIB:.2f} GiB of memory, "
        f"{plan['disk_bytes'] / GIB:.2f} GiB saved"
    )


def row(recipe: str, layers: int, how: str, found: Measured, model: Path, out: Path) -> str:
    """A line of the table."""
    sizes = f"{folder_gib(model):.2f} {folder_gib(out):.2f} {found.disk_gib:.2f}"
    return (
        f"{recipe} {layers} {how} {found.seconds:.0f} {found.cpu_seconds:.0f} "
        f"{found.anonymous_gib:.2f} {sizes} {found.exit_code}"
    )


def main() -> int:
    """Run the compiles and print a table; 1 if one failed or the bytes differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--recipes", nargs="+", default=list(UNITS_OF_LAYER))
    parser.add_argument("--folder", type=Path, default=Path("build/large-mixture"))
    parser.add_argument("--limit-gib", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the model and the results")
    options, rest = parser.parse_known_args()
    print("recipe layers run seconds cpu_s peak_anonymous_gib input_gib output_gib disk_gib exit")
    model = make_mixture(options.folder / f"model-{options.layers}", options.layers)
    failed = False
    for recipe in options.recipes:
        work = options.folder / "out"
        work.mkdir(exist_ok=True)
        half = options.layers * UNITS_OF_LAYER.get(recipe, 6) // 2
        limits = (options.limit_gib, options.threads, rest)
        twice, once = work / f"{recipe}-killed", work / f"{recipe}-whole"
        runs = [
            ("killed", twice, lambda: kept_parts(twice) >= half),  # noqa: B023
            ("resumed", twice, lambda: False),
            ("whole", once, lambda: False),
        ]
        for how, out, kill_when in runs:
            found = compile_limited(model, recipe, out, *limits, kill_when)
            print(row(recipe, options.layers, how, found, model, out), flush=True)
            failed |= found.exit_code != (-9 if how == "killed" else 0)
        same = not failed and same_bytes(twice, once)
        print(f"{recipe}: {'the same bytes' if same else 'NOT the same bytes'}")
        print(foretold(model, recipe), flush=True)
        failed |= not same
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    if not options.keep:
        shutil.rmtree(model)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
