"""openPangu's tokenizer from its tokenizer.model, without the code that ships with the model.

The text between two special tokens is encoded by sentencepiece on its own, so that each such
segment gets the model's prefix space; BOS comes first. Decoding joins the segments again. Source:
tokenization_openpangu.py and tokenizer_config.json of openPangu-Embedded-7B-V1.1.
"""

# ruff: noqa: RUF001  (Chinese text has full-width colons)

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers.tokenization_utils_base import generate_merges
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from panguq.errors import StorageError, first_line
from panguq.extras import require
from panguq.files.limits import TOKENIZER_BYTES, read_limited
from panguq.files.strict_json import parse_json
from panguq.models.checkpoint_files import CONFIG, refuse_pointer
from panguq.models.openpangu.sentencepiece_file import read_settings

logger = logging.getLogger("panguq")

VOCABULARY = "tokenizer.model"
SETTINGS = "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_KEPT = ("add_bos_token", "add_eos_token", "add_prefix_space", "model_max_length", "chat_template")
_SPACE = "▁"

# Texts on which ways to tokenize part: runs of spaces, space at the ends, other white space,
# digits, forms that Unicode normalization changes, several scripts, code, and none at all.
_PROBES = (
    "", " ", "  ", "    a", "a    ", " a b  c   d", "\n", "\n\n\t\t x\r\n", "a\tb",
    "\u3000全角　空格", "1", "1234567890", "3.14159 × 10²", "2024年12月",
    "ﬁ ｆｕｌｌ ① ㎏ e\u0301 é Å", "İıẞß", "你好，世界！", "系统：用户：助手：",
    "Привет, мир", "안녕 세계", "日本語テキスト", "नमस्ते", "😀👍🏽", "\u200b\ufeff\u00a0",
    "def f(x):\n    return x ** 2  # twice\n", "aaaaaaaaaaa bbbb", "▁ ▁▁a", "[unused", "<s", "</",
    "The quick brown fox jumps over the lazy dog.", "http://a.b/c?d=e&f=%20", "a" * 64,
)  # fmt: skip


class PanguTokenizer(SentencePieceBackend):
    """A transformers tokenizer that gives the tokens of openPangu's own class."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        both = {"add_bos_token": add_bos_token, "add_eos_token": add_eos_token}
        super().__init__(vocab_file=vocab_file, **both, **kwargs)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """BOS first and EOS last, each if the settings want it."""
        first = [self.bos_token_id] if self.add_bos_token else []
        last = [self.eos_token_id] if self.add_eos_token else []
        return first + token_ids_0 + (token_ids_1 or []) + last

    def _convert_id_to_token(self, index: int) -> str:
        """No text for the ids above the vocabulary, which pad the model's embedding."""
        return super()._convert_id_to_token(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Sentencepiece decodes what lies between two special tokens."""
        text = ""
        segment: list[str] = []
        for token in tokens:
            if token in self._added_tokens_encoder:
                text += self.sp_model.decode(segment) + token
                segment = []
            elif token:
                segment.append(token)
        return text + self.sp_model.decode(segment)


def is_openpangu_folder(folder: Path) -> bool:
    """Whether a folder's tokenizer is openPangu's, with the vocabulary that it is built from."""
    if not (folder / SETTINGS).is_file() or not (folder / VOCABULARY).is_file():
        return False
    settings = parse_json(read_limited(folder / SETTINGS, TOKENIZER_BYTES), str(folder / SETTINGS))
    return isinstance(settings, dict) and PanguTokenizer.__name__ in (
        settings.get("tokenizer_class"),
        settings.get("original_tokenizer_class"),
    )


def read_openpangu_tokenizer(folder: Path) -> PanguTokenizer:
    """The tokenizer of an openPangu folder: tokenizer.model, tokenizer_config.json and, where that
    leaves a special token out, special_tokens_map.json.

    Raises InputError without the package sentencepiece; StorageError, naming the file, for a
    vocabulary that is damaged or does not fit the settings or the model.
    """
    settings = _object(folder / SETTINGS)
    special = _object(folder / "special_tokens_map.json")
    vocabulary = folder / VOCABULARY
    pieces = _load_pieces(vocabulary)
    added = _added_tokens(settings, folder / SETTINGS)
    roles = {role: _content(settings.get(role, special.get(role))) for role in _ROLES}
    known = {token.content for token in added.values()}
    for role, name in roles.items():
        if name is not None and name not in known and not _has_piece(pieces, name):
            raise StorageError(
                f"{folder / SETTINGS}: {role} is {name}, which {VOCABULARY} does not have", _AGAIN
            )
    _check_fits_model(folder, pieces.get_piece_size(), added)
    _warn_of_other_names(vocabulary, pieces, added)
    kept: dict[str, Any] = {key: settings[key] for key in _KEPT if settings.get(key) is not None}
    template = folder / "chat_template.jinja"
    if template.is_file():
        kept["chat_template"] = template.read_text(encoding="utf-8")
    kept |= {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False, **roles}
    return PanguTokenizer(str(vocabulary), **kept)


def as_fast(tokenizer: PanguTokenizer) -> str | None:
    """The text of a tokenizer.json that gives the same tokens, or None if there is none.

    It is for loaders that run no code of the model's. There is one for a byte-pair vocabulary
    whose normalizer leaves the text as it is; its merges come from the pieces' scores. Equal tokens
    are checked, besides, on every piece of the vocabulary and on texts chosen to differ.
    """
    pieces = tokenizer.sp_model
    settings = read_settings(pieces.serialized_model_proto())
    added = sorted(tokenizer.added_tokens_decoder.items())
    if not settings.is_bpe or not settings.keeps_text or not tokenizer.unk_token:
        return None
    if settings.user_defined - {token.content for _, token in added}:
        return None
    names = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    scores = {
        name: pieces.get_score(index) for index, name in enumerate(names) if _is_text(pieces, index)
    }
    special = {index: token.content for index, token in added}
    vocabulary = {special.get(index, name): index for index, name in enumerate(names)}
    scores = {name: score for name, score in scores.items() if name in vocabulary}
    others = set(vocabulary) - set(scores)
    fast = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, scores, skip_tokens=others),
            unk_token=tokenizer.unk_token,
            fuse_unk=True,
            byte_fallback=settings.byte_fallback,
        )
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens([token for _, token in added])
    if not _is_same(tokenizer, fast, names):
        return None
    if tokenizer.add_bos_token and not tokenizer.add_eos_token:
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
        )
    return str(fast.to_str())


def _is_same(tokenizer: PanguTokenizer, fast: Tokenizer, names: list[str]) -> bool:
    special = list(tokenizer.added_tokens_encoder)
    between = [f"{special[0]}{text}{special[-1]} {text}" for text in _PROBES] if special else []
    for text in (*_PROBES, *between):
        expected = tokenizer(text, add_special_tokens=False).input_ids
        if fast.encode(text, add_special_tokens=False).ids != expected:
            return False
    texts = [name.replace(_SPACE, " ") for name in names if name not in special]
    encoded = fast.encode_batch(texts, add_special_tokens=False)
    return [one.ids for one in encoded] == tokenizer.sp_model.encode(texts)


def _is_text(pieces: Any, index: int) -> bool:
    no_text = (pieces.is_control, pieces.is_byte, pieces.is_unknown, pieces.is_unused)
    return not any(kind(index) for kind in no_text)


def _load_pieces(path: Path) -> Any:
    require("sentencepiece", "openPangu's tokenizer")
    import sentencepiece

    refuse_pointer(path)
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        size = pieces.get_piece_size()
    except (RuntimeError, ValueError, OSError) as error:
        raise StorageError(
            f"{path}: truncated or damaged, not a sentencepiece model: {first_line(error)[:200]}",
            _AGAIN,
        ) from error
    if size == 0:
        raise StorageError(f"{path}: truncated or damaged, it has no pieces", _AGAIN)
    return pieces


def _added_tokens(settings: dict[str, Any], path: Path) -> dict[int, AddedToken]:
    found = {}
    for index, entry in settings.get("added_tokens_decoder", {}).items():
        try:
            content, special = str(entry["content"]), bool(entry.get("special", True))
            found[int(index)] = AddedToken(
                content,
                lstrip=bool(entry.get("lstrip")),
                rstrip=bool(entry.get("rstrip")),
                normalized=False,
                special=special,
            )
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise StorageError(f"{path}: added token {index!r} is no token", _AGAIN) from error
    return found


def _check_fits_model(folder: Path, size: int, added: dict[int, AddedToken]) -> None:
    """Tokens beyond the model's embedding would fail only in the middle of a run."""
    vocabulary = _object(folder / CONFIG).get("vocab_size")
    limit = vocabulary if isinstance(vocabulary, int) else max(size, len(added))
    if size > limit:
        raise StorageError(
            f"{folder / VOCABULARY}: {size} pieces, but the model's vocab_size is {limit}",
            "the tokenizer is of another model; download it again",
        )
    beyond = [index for index in added if not 0 <= index < limit]
    if beyond:
        name = added[beyond[0]].content
        raise StorageError(
            f"{folder / SETTINGS}: {name} is token {beyond[0]}, of {limit} that there are",
            "the tokenizer's files are of two models, or tokenizer.model is truncated",
        )


def _warn_of_other_names(path: Path, pieces: Any, added: dict[int, AddedToken]) -> None:
    """The settings win over the vocabulary, as in the published class; but it may be a mix-up."""
    others = {
        index: pieces.id_to_piece(index)
        for index, token in sorted(added.items())
        if index < pieces.get_piece_size() and pieces.id_to_piece(index) != token.content
    }
    for index, name in list(others.items())[:1]:
        logger.warning(
            "%s: calls token %d %s, and %s calls it %s, which is taken (%d such tokens); "
            "are the two files of one model?",
            *(path, index, name, SETTINGS, added[index].content, len(others)),
        )


def _has_piece(pieces: Any, name: str) -> bool:
    return bool(pieces.id_to_piece(pieces.piece_to_id(name)) == name)


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return None if value is None else str(value)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; of a missing file, none."""
    if not path.is_file():
        return {}
    value = parse_json(read_limited(path, TOKENIZER_BYTES), str(path))
    if not isinstance(value, dict):
        raise StorageError(f"{path}: not an object", _AGAIN)
    return value


_AGAIN = "download the tokenizer's files again"
