"""A checkpoint's folder as its files say it is, and the rules that hold for files of any format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from panguq.check.model import ExpectedModel, expected_model
from panguq.errors import PanguqError, StorageError
from panguq.files.limits import (
    CONFIG_BYTES,
    INDEX_BYTES,
    TOKENIZER_BYTES,
    read_limited,
    refuse_larger,
)
from panguq.files.safetensors_header import count_tensors, refuse_too_many
from panguq.files.strict_json import parse_json
from panguq.models.config import check_known_sizes
from panguq.server_models import class_answer, expert_notes
from panguq.server_releases import SERVERS, Server

CONFIG = "config.json"
DESCRIPTION = "quant_model_description.json"
ALL: tuple[Server, ...] = SERVERS
SERVING: tuple[Server, ...] = tuple(server for server in SERVERS if server != "transformers")
TEXTS = (".json", ".jinja", ".model", ".txt")
"""Endings of files that a loader reads whole."""
NOBODY: tuple[Server, ...] = ()


@dataclass(frozen=True)
class Hit:
    """A rule that a folder breaks: the tensor (or module, or file), what is wrong with it.

    `breaks`: the servers that refuse the folder or compute something else because of it, where
    that is not what the rule says.
    """

    tensor: str
    message: str
    breaks: tuple[Server, ...] | None = None


@dataclass(frozen=True)
class Rule:
    """What a folder must keep: a name, the servers that fail without it, and how to find out."""

    name: str
    breaks: tuple[Server, ...]
    find: Callable[[CheckedFolder], Iterable[Hit]]
    source: str = ""


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor's form: dtype as safetensors spells it (`I8`, `BF16`), and its file."""

    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass
class CheckedFolder:
    """A folder whose JSON files and safetensors headers have been read; tensors on demand."""

    path: Path
    config: dict[str, Any] | None = None
    description: dict[str, Any] | None = None
    index: dict[str, str] | None = None
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    duplicates: list[tuple[str, str, str]] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """What could not be read, by file name."""
    versions: dict[Server, str] = field(default_factory=dict)
    """The release that is meant of a server, where it is not the newest."""

    @cached_property
    def model(self) -> ExpectedModel | None:
        """The modules that config.json asks for, under their published names, or under those that
        they have in memory where the folder has these; None if panguq cannot tell."""
        if self._in_memory is None:
            return None
        return self._in_memory if self.renamed else self._in_memory.published()

    @cached_property
    def renamed(self) -> dict[str, str]:
        """The tensors that are called as transformers calls them in memory, which is not as they
        are published; with their published names."""
        model = self._in_memory
        return {} if model is None else model.called_as_in_memory(self.tensors)

    @cached_property
    def _in_memory(self) -> ExpectedModel | None:
        found = None if self.config is None else expected_model(self.config)
        return None if found is None else found.as_stored(self.tensors)

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """What config.json says of quantization."""
        found = (self.config or {}).get("quantization_config")
        return found if isinstance(found, dict) else None

    @property
    def dtype(self) -> str:
        """The dtype that config.json gives the model; empty if it does not say."""
        config = self.config or {}
        return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")

    @property
    def is_tied(self) -> bool:
        """Whether the logits' weight is the embedding's."""
        return bool((self.config or {}).get("tie_word_embeddings", False))

    def tensor(self, name: str) -> Tensor:
        """A tensor's values, memory-mapped."""
        from safetensors import safe_open

        file = self.path / self.tensors[name].file
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            found: Tensor = opened.get_tensor(name)
        return found


def open_folder(path: str | Path) -> CheckedFolder:
    """Read what there is. Raises StorageError only if there is no folder at all."""
    folder = Path(path)
    if not folder.is_dir():
        raise StorageError(f"{folder}: no such folder", "give a folder with a checkpoint in it")
    found = CheckedFolder(folder)
    found.config = _config(found)
    found.description = _object(found, DESCRIPTION)
    found.index = _index(found)
    _look_at_sizes(found)
    for file in sorted(folder.glob("*.safetensors")):
        _read_header(found, file)
    return found


def _config(folder: CheckedFolder) -> dict[str, Any] | None:
    """config.json, unless it asks for more than any model has."""
    config = _object(folder, CONFIG)
    try:
        check_known_sizes(config or {}, Path(CONFIG))
    except StorageError as error:
        folder.damaged[CONFIG] = error.message
        return None
    return config


def _look_at_sizes(folder: CheckedFolder) -> None:
    """Name what a server would read whole and is larger than any such file."""
    for path in sorted(folder.path.iterdir()):
        if path.suffix in TEXTS and path.is_file():
            try:
                refuse_larger(Path(path.name), path.stat().st_size, TOKENIZER_BYTES)
            except StorageError as error:
                folder.damaged.setdefault(path.name, error.message)


def _object(folder: CheckedFolder, name: str) -> dict[str, Any] | None:
    path = folder.path / name
    if not path.is_file():
        return None
    try:
        largest = CONFIG_BYTES if name == CONFIG else INDEX_BYTES
        value = parse_json(read_limited(path, largest), name)
    except (PanguqError, OSError) as error:
        folder.damaged[name] = getattr(error, "message", str(error))
        return None
    if not isinstance(value, dict):
        folder.damaged[name] = "not a JSON object"
        return None
    return value


def _index(folder: CheckedFolder) -> dict[str, str] | None:
    """The union of the folder's indices: which file is said to hold a tensor."""
    places: dict[str, str] = {}
    files = sorted(folder.path.glob("*.safetensors.index.json"))
    for file in files:
        value = _object(folder, file.name)
        listed = None if value is None else value.get("weight_map")
        if isinstance(listed, dict):
            places |= {str(name): str(place) for name, place in listed.items()}
        elif value is not None:
            folder.damaged[file.name] = "it has no weight_map"
    return places if files else None


def _read_header(folder: CheckedFolder, file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        refuse_too_many(folder.path, len(folder.tensors) + count_tensors(file))
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                info = TensorInfo(part.get_dtype(), tuple(part.get_shape()), file.name)
                if name in folder.tensors:
                    folder.duplicates.append((name, folder.tensors[name].file, file.name))
                folder.tensors[name] = info
    except (SafetensorError, OSError) as error:
        folder.damaged[file.name] = f"truncated or no safetensors file: {error}"
    except StorageError as error:
        folder.damaged[file.name] = error.message


# --- rules --------------------------------------------------------------------------------------


def _damaged_file(folder: CheckedFolder) -> Iterator[Hit]:
    for name, why in sorted(folder.damaged.items()):
        yield Hit(name, why)


def _missing_config(folder: CheckedFolder) -> Iterator[Hit]:
    if folder.config is None and CONFIG not in folder.damaged:
        yield Hit(CONFIG, "missing: no server knows which model this is")


def _no_weights(folder: CheckedFolder) -> Iterator[Hit]:
    if not any(folder.path.glob("*.safetensors")):
        yield Hit("*.safetensors", "missing: there are no weights")


def _missing_shard(folder: CheckedFolder) -> Iterator[Hit]:
    for file in sorted(set((folder.index or {}).values())):
        if not (folder.path / file).is_file():
            yield Hit(file, "missing, but the index names it")


def _index_disagrees(folder: CheckedFolder) -> Iterator[Hit]:
    if folder.index is None:
        return
    for name, file in sorted(folder.index.items()):
        info = folder.tensors.get(name)
        readable = (folder.path / file).is_file() and file not in folder.damaged
        if readable and (info is None or info.file != file):
            where = "in no file" if info is None else f"in {info.file}"
            yield Hit(name, f"the index says {file}, but it is {where}")
    for name, info in sorted(folder.tensors.items()):
        if name not in folder.index:
            yield Hit(name, f"it is in {info.file}, and the index does not name it")


def _duplicate_tensor(folder: CheckedFolder) -> Iterator[Hit]:
    for name, one, other in folder.duplicates:
        yield Hit(name, f"it is in {one} and in {other}; remove the file that does not belong here")


def _no_tokenizer(folder: CheckedFolder) -> Iterator[Hit]:
    names = {file.name for file in folder.path.iterdir()}
    if not names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}:
        yield Hit("tokenizer.json", "there is no tokenizer; give the server one (--tokenizer DIR)")


def _missing_weight(folder: CheckedFolder) -> Iterator[Hit]:
    """A parameter of the architecture that no tensor can stand for."""
    if folder.model is None or not folder.tensors:
        return
    for name in folder.model.parameters:
        path, _, leaf = name.rpartition(".")
        packed = {f"{path}.weight_packed", f"{path}.qweight"} if leaf == "weight" else set()
        stands_for = {name, *packed}
        tied = folder.is_tied and name in folder.model.tied
        if not stands_for & folder.tensors.keys() and not tied:
            yield Hit(name, "missing, and the architecture has it")


def _names_in_memory(folder: CheckedFolder) -> Iterator[Hit]:
    for name, published in folder.renamed.items():
        yield Hit(
            name,
            f"transformers has this name in memory; it is published as {published}, which servers "
            "look for",
        )


def _no_class(folder: CheckedFolder) -> Iterator[Hit]:
    for server in SERVERS if folder.config is not None else ():
        answer = class_answer(server, folder.config or {})
        if answer.has is False:
            yield Hit(CONFIG, answer.reason, (server,))


def _uneven_experts(folder: CheckedFolder) -> Iterator[Hit]:
    for note in expert_notes(folder.config or {}):
        yield Hit(CONFIG, note)


def _unknown_model(folder: CheckedFolder) -> Iterator[Hit]:
    if folder.config is not None and folder.model is None:
        kind = folder.config.get("model_type")
        yield Hit(
            CONFIG,
            f"model type {kind!r} is none that panguq can build, so that what is missing for it "
            "could not be looked up; the rest was checked",
        )


FILE_RULES = (
    Rule("damaged-file", ALL, _damaged_file),
    Rule("missing-config", ALL, _missing_config),
    Rule("no-weights", ALL, _no_weights),
    Rule("missing-shard", ALL, _missing_shard),
    Rule("index-disagrees", ALL, _index_disagrees),
    Rule("duplicate-tensor", ALL, _duplicate_tensor, "vLLM loads every safetensors file there is"),
    Rule("missing-weight", ALL, _missing_weight),
    Rule("names-in-memory", SERVING, _names_in_memory, "transformers, conversion_mapping.py"),
    Rule("no-tokenizer", NOBODY, _no_tokenizer),
    Rule("no-class", ALL, _no_class, "panguq.server_models"),
    Rule("uneven-experts", NOBODY, _uneven_experts, "vLLM, fused_moe; aclnnGroupedMatmul"),
    Rule("unknown-model", NOBODY, _unknown_model),
)


def shards_of(
    names: Iterable[str], fused: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules that servers fuse: the fused module's path and those of its shards, where all are."""
    known = set(names)
    for whole, parts in fused.items():
        for name in sorted(known):
            owner, _, leaf = name.rpartition(".")
            if leaf == parts[0]:
                shards = tuple(f"{owner}.{part}".lstrip(".") for part in parts)
                if all(shard in known for shard in shards):
                    yield f"{owner}.{whole}", shards
