"""The tokenizer that a GGUF file describes, for the pre-tokenizers that are known exactly.

transformers' own conversion ignores which pre-tokenizer a file names (`tokenizer.ggml.pre`) and
gives other tokens than the model was trained on, so it is not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from panguq.errors import InputError, StorageError
from panguq.models.gguf.weights import damaged, need

_CONTROL = 3  # the token type of GGUF's tokenizer.ggml.token_type for <bos> and the like
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def read_gguf_tokenizer(file: Path) -> Any:
    """A fast tokenizer from a GGUF file's vocabulary, merges and pre-tokenizer.

    Raises InputError for a kind that is not known exactly, with tokenizer.json as the way out;
    StorageError for a damaged file.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    fields = _fields(file)
    kind, pre = fields.get("model"), fields.get("pre", "default")
    if kind != "gpt2" or pre not in ("smollm", "gpt-2"):
        raise InputError(
            f"{file}: its tokenizer ({kind}, pre-tokenizer {pre}) is not built from GGUF",
            "put the model's tokenizer.json and tokenizer_config.json beside the file",
        )
    tokens, types = fields.get("tokens", []), fields.get("token_type", [])
    if not tokens or len(tokens) != len(types):
        raise StorageError(
            f"{file}: {len(tokens)} tokens and {len(types)} token types", "download it again"
        )
    merges = [tuple(merge.split(" ")) for merge in fields.get("merges", [])]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = _pre_tokenizer(pre)
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, types, strict=True)
    bpe.add_special_tokens([AddedToken(t, special=True) for t, kind in kinds if kind == _CONTROL])
    special = {
        role: tokens[fields[f"{name}_token_id"]]
        for name, role in _ROLES.items()
        if f"{name}_token_id" in fields
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    tokenizer.chat_template = fields.get("chat_template")
    return tokenizer


def _pre_tokenizer(name: str) -> Any:
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":  # digits one by one, then byte-level BPE
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    return byte_level


def _fields(file: Path) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a file, by the rest of their names."""
    need("gguf")
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(file)).fields
    except Exception as error:  # it indexes and reshapes whatever the bytes say
        raise damaged(file, error) from error
    found = {}
    for name, field in fields.items():
        for prefix in ("tokenizer.ggml.", "tokenizer."):
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = field.contents()
                break
    return found
