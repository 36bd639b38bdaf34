"""Run by msModelSlim's Python: quantize a small random model with its V1 command line on the CPU.

python quantize_v1.py OUT DTYPE
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = dict(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    tie_word_embeddings=False, attention_bias=True, mlp_bias=False,
)  # fmt: skip
CONFIG = """\
apiversion: modelslim_v1
metadata:
  config_id: small
  score: 1
  verified_model_types: []
  label: {w_bit: 8, a_bit: 8, is_sparse: False, kv_cache: False}
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_tensor, dtype: int8, symmetric: False, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*"]
      exclude: ["*down_proj*"]
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: True, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: True, method: minmax}
      include: ["*down_proj*"]
  save:
    - type: ascendv1_saver
      part_file_size: 4
  dataset: data_list_1.jsonl
"""


def main() -> None:
    """Write a float model with a tokenizer of bytes, and let `msmodelslim quant` read it."""
    out, dtype = Path(sys.argv[1]), sys.argv[2]
    os.umask(0o027)  # it refuses files that others may write
    shutil.rmtree(out, ignore_errors=True)
    source = out.with_name(f"{out.name}-float")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(getattr(torch, dtype)).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(source)
    recipe = source / "quantization.yaml"
    recipe.write_text(CONFIG)
    command = [sys.executable, "-m", "msmodelslim.cli", "quant", "--model_type", "default"]
    command += ["--model_path", str(source), "--save_path", str(out), "--device", "cpu"]
    command += ["--config_path", str(recipe), "--trust_remote_code", "False"]
    subprocess.run(command, check=True)
    shutil.rmtree(source)


if __name__ == "__main__":
    main()
