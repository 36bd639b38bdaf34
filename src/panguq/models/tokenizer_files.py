"""A tokenizer's own files: into a compiled model's folder, and out of any local folder."""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panguq.errors import InputError, PanguqError, StorageError
from panguq.files.limits import CONFIG_BYTES, TOKENIZER_BYTES, refuse_larger
from panguq.files.strict_json import json_text
from panguq.models.config import check_known_sizes, read_object

logger = logging.getLogger("panguq")

_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
READ = _SUFFIXES | {".bpe", ".spm", ".tiktoken", ".vocab"}
_WHERE_IT_CAME_FROM = ("is_local", "local_files_only", "name_or_path", "auto_map")


def tokenizer_files(tokenizer: Any) -> dict[str, bytes | str]:
    """The files that `save_pretrained` writes, without code and without where it was loaded from,
    so that a tokenizer that was saved and loaded gives the same bytes again.

    openPangu's comes with a tokenizer.json of equal tokens, which other loaders take as it is.
    """
    with tempfile.TemporaryDirectory(prefix="panguq-") as folder:
        several = isinstance(getattr(tokenizer, "chat_template", None), dict)
        tokenizer.save_pretrained(folder, **({"save_jinja_files": False} if several else {}))
        paths = [p for p in Path(folder).iterdir() if p.is_file() and p.suffix in _SUFFIXES]
        files: dict[str, bytes | str] = {path.name: path.read_bytes() for path in sorted(paths)}
    name = "tokenizer_config.json"
    settings = json.loads(files[name])
    kept = {key: value for key, value in settings.items() if key not in _WHERE_IT_CAME_FROM}
    if type(tokenizer).__name__ == "PanguTokenizer":
        _add_fast(tokenizer, files, kept)
    files[name] = json_text(kept, sort_keys=True)
    return files


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a local folder. Its own code, if it comes with any, is not run.

    Raises InputError if there is none, or none that transformers can load by itself; StorageError
    for a file larger than any tokenizer's, and for an openPangu tokenizer whose files are damaged.
    """
    from transformers import AutoTokenizer

    _check_sizes(folder)
    has_fast = (folder / "tokenizer.json").is_file()
    if not has_fast or importlib.util.find_spec("sentencepiece") is not None:
        from panguq.models.openpangu.tokenizer import is_openpangu_folder, read_openpangu_tokenizer

        if is_openpangu_folder(folder):
            return read_openpangu_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever its loaders happen to
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{folder}: no tokenizer that can be loaded: {lines[0][:200]}",
            "put tokenizer.json there, or load the tokenizer yourself and pass tokenizer=; code "
            "that comes with a model is never run",
        ) from error


def tokenizer_of(files: Mapping[str, bytes], folder: Path) -> Any:
    """The tokenizer of these files of `folder`, whatever lies there beside them.

    transformers looks into a folder for a dozen names, so it is given one with these alone. Raises
    as `read_tokenizer` does, and OSError.
    """
    with tempfile.TemporaryDirectory(prefix="panguq-") as place:
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        try:
            tokenizer = read_tokenizer(Path(place))
        except PanguqError as error:
            raise type(error)(error.message.replace(place, str(folder)), error.hint) from error
        # a slow one copies its vocabulary again when it is saved
        vars(tokenizer).update(_elsewhere(vars(tokenizer), place, str(folder)))
    return tokenizer


def _elsewhere(value: Any, here: str, there: str) -> Any:
    """Plain data with the paths in `here` as paths in `there`."""
    if isinstance(value, str):
        return there + value.removeprefix(here) if value.startswith(here) else value
    if type(value) is dict:
        return {key: _elsewhere(item, here, there) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_elsewhere(item, here, there) for item in value)
    return value


def _check_sizes(folder: Path) -> None:
    """Refuse what transformers would read or make much of, config.json among it."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix in READ:
            largest = CONFIG_BYTES if path.name == "config.json" else TOKENIZER_BYTES
            refuse_larger(path, path.stat().st_size, largest, "download the file again")
    config = folder / "config.json"
    if config.is_file():
        try:
            data = read_object(config)
        except StorageError:  # a tokenizer may do without
            return
        check_known_sizes(data, config)


def _add_fast(tokenizer: Any, files: dict[str, bytes | str], settings: dict[str, Any]) -> None:
    from panguq.models.openpangu.tokenizer import as_fast

    fast = as_fast(tokenizer)
    if fast is None:
        logger.warning(
            "openPangu's vocabulary has no equal tokenizer.json: servers will need the original's "
            "tokenizer files"
        )
        return
    files["tokenizer.json"] = fast
    settings["original_tokenizer_class"] = settings["tokenizer_class"]
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
