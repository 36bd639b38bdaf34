"""The models that are quantized and the tokens that calibrate and evaluate them, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CALIBRATION_WINDOWS = 16
WINDOW = 512
VOCABULARY = 8192
# Every k is a multiple of 128; as wide as it can be where a run shall take minutes on two cores.
RANDOM_SIZES = dict(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=1024,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def model_folder(name: str, work: Path) -> Path:
    """`smollm2`, fetched on first use, or `random`, a Llama of fixed random weights."""
    if name == "smollm2":
        from demo.fetch import default_cache, fetch_model

        return fetch_model(default_cache())
    folder = work / "random-model"
    if not (folder / "tokenizer.json").exists():  # written last
        write_random_model(folder)
    return folder


def write_random_model(folder: Path, **sizes: Any) -> None:
    """A random Llama in transformers' format, with a tokenizer of one token a number.

    Some channels of the residual stream are twenty times the others, as in trained models.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**RANDOM_SIZES, **sizes}))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, ::97] *= 20
    model.save_pretrained(folder)
    number_tokenizer(model.config.vocab_size).save_pretrained(folder)


def number_tokenizer(size: int) -> Any:
    """A tokenizer whose token i is written `i`; peers load one with every model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="1", eos_token="2", unk_token="0", pad_token="0"
    )


def tokens_file(name: str, folder: Path, work: Path, windows: int) -> Path:
    """Token ids int64: `calibration` `[16, 512]` and `evaluation` `[windows, 512]`.

    For SmolLM2 half Python's language reference and half its own text, and Wikipedia; for the
    random model random.
    """
    path = work / f"tokens-{name}-{windows}.safetensors"
    if not path.exists():
        found = _text_tokens(folder, windows) if name == "smollm2" else random_tokens(windows)
        save_file(found, path)
    return path


def random_tokens(windows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> dict[str, Tensor]:
    """Both kinds of tokens from one seeded generator, special tokens left out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.randint(3, vocabulary, (count, WINDOW), generator=generator)

    return {"calibration": draw(CALIBRATION_WINDOWS), "evaluation": draw(windows)}


def _text_tokens(folder: Path, windows: int) -> dict[str, Tensor]:
    import panguq
    from bench.calibration import calibration_windows
    from demo.fetch import default_cache, fetch_evaluation_text
    from demo.run import windows_of

    tokenizer, cache = panguq.load_tokenizer(folder), default_cache()
    return {
        "calibration": calibration_windows(folder, cache, *(2 * (CALIBRATION_WINDOWS // 2,))),
        "evaluation": windows_of(fetch_evaluation_text(cache), tokenizer, windows),
    }


def read_tokens(path: Path, kind: str) -> Tensor:
    """One kind of tokens of a tokens file."""
    return load_file(path)[kind]
