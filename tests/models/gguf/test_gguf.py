"""GGUF files, written here in llama.cpp's layout, load through transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import panguq
from panguq.cli import main
from panguq.errors import InputError, PanguqError, StorageError
from panguq.models.hf import load_pretrained, load_tokenizer, skeleton
from tests.model_folders import SIZES, TEXT, make_model, make_tokenizer

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
IDS = torch.arange(3, 35)[None]


def write_gguf(path: Path, model: Any, quantized: bool = False, **fields: str) -> Path:
    """A Llama as llama.cpp's converter writes it: its names, its order of rows in q and k.

    `quantized`: matrices as Q8_0 blocks, else float32. `fields` override the metadata.
    """
    config = model.config
    writer = gguf.GGUFWriter(str(path), fields.get("architecture", "llama"))
    writer.add_block_count(int(fields.get("layers", config.num_hidden_layers)))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = make_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"<extra{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model(fields.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(fields.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types(
        [3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens]
    )
    writer.add_token_merges([])
    for add, name in (writer.add_bos_token_id, "<bos>"), (writer.add_pad_token_id, "<pad>"):
        add(vocabulary[name])
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, array in llama_tensors(model):
        if quantized and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_tensors(model: Any) -> list[tuple[str, np.ndarray]]:
    renamed = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers": "blk", "lm_head": "output",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    }  # fmt: skip
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    found = []
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        for kind, count in heads.items():
            if kind in name:  # pairs of a head lie side by side there, half a head apart here
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2)
                array = np.ascontiguousarray(array.reshape(-1, weight.shape[1]))
        for old, new in renamed.items():
            name = name.replace(old, new)
        found.append((name, array))
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf", make_model())


@pytest.mark.parametrize("by_folder", [False, True])
def test_the_model_in_the_file_loads(file: Path, by_folder: bool) -> None:
    model, source = load_pretrained(file.parent if by_folder else file), make_model()
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, source(IDS).logits)


def test_blocks_become_the_float32_numbers_that_they_stand_for(tmp_path: Path) -> None:
    source = make_model()
    model = load_pretrained(write_gguf(tmp_path / "q8.gguf", source, quantized=True))
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in model.state_dict().items():
        expected = source.state_dict()[name].numpy()
        if expected.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
        assert weight.dtype == torch.float32
        assert np.array_equal(weight.numpy(), expected), name


def test_its_tokenizer_is_built_from_the_file_or_taken_from_beside_it(
    file: Path, tmp_path: Path
) -> None:
    expected = make_tokenizer()("Two words, 12\n").input_ids
    assert load_tokenizer(file)("Two words, 12\n").input_ids == expected
    assert load_tokenizer(file).bos_token == "<bos>"
    assert load_tokenizer(file).chat_template
    beside = write_gguf(tmp_path / "spm.gguf", make_model(), tokenizer="llama")
    with pytest.raises(InputError, match="llama, pre-tokenizer gpt-2") as caught:
        load_tokenizer(beside)
    assert "tokenizer.json" in caught.value.hint
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(beside)("Two words, 12\n").input_ids == expected


def test_commands_take_it(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    short = ["--windows", "2", "--window", "64"]
    out = tmp_path / "out"
    arguments = ["compile", file, "--recipe", "w8a8", "--calibration", text, "--out", out, *short]
    assert main([str(a) for a in arguments]) == 0
    assert main([str(a) for a in ["compile", file, "--recipe", "w8a8", "--dry-run"]]) == 0
    arguments = ["eval", out, "--against", file, "--text", text, *short, "--json"]
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    assert json.loads(capsys.readouterr().out)["float_perplexity"] > 1
    assert main(["generate", str(out), "--prompt", "A", "--max-new-tokens", "2"]) == 0


def test_a_skeleton_reads_no_weights(file: Path) -> None:
    model = skeleton(file)
    assert all(type(p.data).__name__ == "FakeTensor" for p in model.parameters())
    assert model.config.hidden_size == SIZES["hidden_size"]


# --- what is refused ----------------------------------------------------------------------------


def refused(kind: type[PanguqError], path: Path) -> str:
    with pytest.raises(kind) as caught:
        load_pretrained(path)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("size", [0, 3, 40, 1000, 20_000, -1])
def test_a_truncated_file(file: Path, tmp_path: Path, size: int) -> None:
    copy = tmp_path / "cut.gguf"
    copy.write_bytes(file.read_bytes()[:size])
    assert "cut.gguf: truncated or damaged" in refused(StorageError, copy)
    if size < 20_000:  # its end holds no words
        with pytest.raises(StorageError, match=r"cut\.gguf: truncated or damaged"):
            load_tokenizer(copy)


def test_no_gguf_at_all(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("this is a text, not a model")
    assert "not a GGUF file" in refused(StorageError, tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_pretrained(tmp_path / "missing.gguf")


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "pangu.gguf", make_model(), architecture="pangu-embedded")
    message = refused(InputError, path)
    assert "architecture pangu-embedded is not supported" in message


def test_a_billion_layers(tmp_path: Path) -> None:
    """Of an architecture whose configuration has an entry for each."""
    path = write_gguf(tmp_path / "m.gguf", make_model(), architecture="qwen3", layers="1000000000")
    assert "num_hidden_layers is 1000000000" in refused(StorageError, path)


def test_several_files(file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    assert "holds 2 GGUF files, a.gguf among them" in refused(InputError, tmp_path)
    assert load_pretrained(tmp_path / "b.gguf").dtype == torch.float32


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_a_package_that_it_needs(file: Path, package: str) -> None:
    code = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: name != {package!r} and find(name, *rest) or None
from panguq.errors import InputError
from panguq.models.hf import load_pretrained
try:
    load_pretrained({str(file)!r})
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"reading GGUF files needs the package {package}, which is not installed" in done.stdout
    assert "pip install 'panguq[gguf]'" in done.stdout


def test_a_compiled_gguf_model_is_saved_like_any_other(file: Path, tmp_path: Path) -> None:
    compiled = panguq.compile(load_pretrained(file), "w8a16", calibration=IDS)
    compiled.save(tmp_path / "out")
    loaded = panguq.load(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, compiled(IDS).logits)
