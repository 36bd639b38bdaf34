"""What panguq says to every class that transformers registers: right, refused, or at fault.

`make test-every-class`. Each class gets a tiny random model whose config is made by rule, so that
families are tried that nobody wrote down. A class is at fault if a compile ends in anything but a
sentence, if a result is wrong, or if the dry run and the compile do not refuse the same.
"""

from __future__ import annotations

import argparse
import copy
import logging
import multiprocessing
import resource
import sys
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

import panguq
from panguq.errors import PanguqError
from panguq.ir.encoder import is_encoder
from tests.families.encoder_sweep import check_encoder, inputs_of, near
from tests.families.models import randomize
from tests.families.sweep import CALIBRATION, check_float, quantized
from tests.shared_traces import shared_traces

MAPPINGS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text-encoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "model": "MODEL_MAPPING_NAMES",
}
LAYERS, CPU_SECONDS = 2, 60
SIZES: dict[int, tuple[str, ...]] = {
    64: ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "emb_dim", "embedding_size",
         "word_embed_proj_dim", "hidden_dim", "d_embed", "moe_latent_size"),
    128: ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim",
          "ffn_hidden_size", "dff", "dim_ff", "intermediate_size_mlp",
          "shared_expert_intermediate_size", "shared_intermediate_size"),
    32: ("moe_intermediate_size", "expert_ffn_hidden_size", "q_lora_rank", "kv_lora_rank",
         "o_lora_rank", "window_size", "sliding_window", "attention_chunk_size", "dim_head",
         "hidden_size_per_layer_input", "image_size", "index_head_dim", "ffn_expert_size"),
    16: ("head_dim", "d_kv", "kv_channels", "v_head_dim", "attention_head_size", "qk_head_dim",
         "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head",
         "mamba_head_dim", "mamba_headdim", "mamba_d_state", "ssm_state_size", "state_size",
         "global_head_dim", "swa_head_dim", "swa_v_head_dim"),
    8: ("qk_rope_head_dim", "rotary_dim", "patch_size", "laurel_rank", "index_topk",
        "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
        "decoder_attention_heads", "num_experts", "n_routed_experts", "num_local_experts",
        "moe_num_experts", "linear_num_value_heads", "index_n_heads", "num_attn_heads",
        "linear_num_key_heads", "swa_num_attention_heads", "linear_num_heads"),
    LAYERS: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
             "decoder_layers", "num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads",
             "num_experts_per_tok", "num_experts_per_token", "moe_k", "attn_layer_period",
             "moe_topk", "top_k_experts", "moe_top_k",
             "num_encoder_layers", "num_decoder_layers", "num_hidden_groups_", "mamba_n_groups",
             "linear_num_groups", "n_groups", "swa_num_key_value_heads"),
    1: ("attn_layer_offset", "n_group", "topk_group", "first_k_dense_replace", "n_shared_experts",
        "moe_num_shared_experts", "num_kv_shared_layers", "num_nextn_predict_layers"),
}  # fmt: skip
VOCAB, POSITIONS = 256, 128
SIZE_OF = {name: size for size, names in SIZES.items() for name in names} | {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "max_position_embeddings": POSITIONS,
    "n_positions": POSITIONS,
    "max_seq_len": POSITIONS,
}
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same class whose known sizes are small; lists with an entry a layer are cut
    so that every kind in them comes once."""
    changed: dict[str, Any] = {}
    given = vars(config)
    latent = "qk_rope_head_dim" in given  # whose other sizes follow from these
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = shrink(value).to_dict()
        elif isinstance(value, int) and not isinstance(value, bool) and name in SIZE_OF:
            if not (latent and name in ("head_dim", "qk_head_dim", "num_key_value_heads")):
                changed[name] = min(value, SIZE_OF[name]) if value > 0 else value
        elif name in TOKENS and isinstance(value, int) and value >= VOCAB:
            changed[name] = 1 + TOKENS.index(name)
    if latent and "num_key_value_heads" in given:
        changed["num_key_value_heads"] = 4
    layers = next((given[n] for n in SIZES[LAYERS][:4] if isinstance(given.get(n), int)), 0)
    kept = max(LAYERS, len(given.get("block_types") or given.get("_block_types") or ()))
    changed |= {name: kept for name in SIZES[LAYERS][:4] if name in given}
    kinds = given.get("layer_types") or given.get("layers_block_type")
    if isinstance(kinds, list) and len(kinds) == layers:
        firsts = sorted(kinds.index(kind) for kind in set(kinds))
        kept = max(len(firsts), LAYERS)
        places = sorted([*firsts, *(i for i in range(layers) if i not in firsts)][:kept])
        for name, value in given.items():
            if isinstance(value, list) and len(value) == layers:
                changed[name] = [value[i] for i in places]
        changed |= {n: kept for n in SIZES[LAYERS][:4] if n in given}
    else:
        changed |= {
            name: value[:kept]
            for name, value in given.items()
            if isinstance(value, list) and layers > 1 and len(value) == layers
        }
    return type(config)(**changed)


def make(mapping: str, model_type: str) -> Any:
    """A random float32 model of the mapping's class for a type of config."""
    named = getattr(modeling_auto, MAPPINGS[mapping])[model_type]
    kind = getattr(transformers, named if isinstance(named, str) else named[0])
    config = transformers.CONFIG_MAPPING[model_type]()
    whole = isinstance(config, kind.config_class or PreTrainedConfig)
    config = shrink(config if whole else config.get_text_config(decoder=True))
    torch.manual_seed(0)
    model = kind(config).eval()
    randomize(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def result(mapping: str, model_type: str, quick: bool) -> str:
    """`right`, `refused: <sentence>`, `not made: <why>`, or what is at fault."""
    try:
        model = make(mapping, model_type)
        with torch.no_grad():
            ids = CALIBRATION[0]
            model(**(inputs_of(model, 9) if is_encoder(model) else {"input_ids": ids}))
    except Exception as error:
        return f"not made: {_first_line(error)}"
    with shared_traces():
        refused = _refusal(lambda: panguq.compile(model, "float"))
        if refused or not quick:
            planned = _refusal(lambda: panguq.plan(_skeleton(model), "w8a8-dynamic"))
            if planned != refused:
                return f"FAULT: the dry run says {planned!r}, the compile {refused!r}"
        if refused or quick:
            return f"refused: {refused}" if refused else "right"
        compiled: Any = panguq.compile(model, "float")
        encodes = is_encoder(model)
        data = [inputs_of(model, 14, seed) for seed in (2, 3)] if encodes else CALIBRATION
        (check_encoder if encodes else check_float)(model, compiled)
        dynamic = panguq.compile(model, "w8a8-dynamic", calibration=data)
        (near if encodes else quantized)(model, dynamic, 0.0)
    return "right"


def _skeleton(model: Any) -> Any:
    """The model without weights, as a plan of a folder reads it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(x): mode.from_tensor(x) for x in tensors}
    return copy.deepcopy(model, memo)


def _refusal(command: Any) -> str:
    """The sentence with which a command refuses, or nothing."""
    try:
        command()
    except PanguqError as error:
        return error.message
    return ""


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _tell(mapping: str, model_type: str, quick: bool, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    try:
        said = result(mapping, model_type, quick)
    except PanguqError as error:
        said = f"FAULT: refused late: {error.message}"
    except Exception as error:
        traceback.print_exc()
        said = f"FAULT: {_first_line(error)}"
    pipe.send((said, time.process_time()))


def run(mapping: str, model_type: str, quick: bool) -> tuple[str, float]:
    """The result and the CPU seconds, from a process of its own."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_tell, args=(mapping, model_type, quick, writer))
    child.start()
    writer.close()
    try:
        said: tuple[str, float] = reader.recv()
    except EOFError:
        child.join()
        said = f"FAULT: the process ended with {child.exitcode}", float(CPU_SECONDS)
    child.join()
    return said


def main() -> None:
    """Try every class of a mapping; exit with 1 if any is at fault."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("types", nargs="*", help="these types of configs alone")
    parser.add_argument("--mapping", choices=MAPPINGS, default="causal-lm")
    parser.add_argument("--log", type=Path, help="append a line for each class here")
    parser.add_argument(
        "--quick", action="store_true", help="stop at the graph, which is compared with the model"
    )
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    for model_type in given.types or getattr(modeling_auto, MAPPINGS[given.mapping]):
        said, seconds = run(given.mapping, model_type, given.quick)
        counts[said.partition(":")[0]] += 1
        line = f"{seconds:5.1f} s  {model_type}: {said}"
        print(line, flush=True)
        if given.log:
            with given.log.open("a", encoding="utf-8") as log:
                log.write(line + "\n")
    print(", ".join(f"{number} {kind}" for kind, number in counts.most_common()))
    sys.exit(counts["FAULT"] > 0)


if __name__ == "__main__":
    main()
