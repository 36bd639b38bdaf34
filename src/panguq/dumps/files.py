"""The files of a dump: what its JSON holds, and how files are written whole and read with care.

    summary.txt            one line a pass, for people
    dump.json              DumpInfo
    probe.safetensors      the probe input
    NN_pass/stage.json     StageInfo
    NN_pass/graph.json     the graph; its weights are named in stage.json by content hash
    NN_pass/graph.txt      the same for people; graph.diff, skipped.csv, the pass's own tables
    NN_pass/tensors.safetensors    tensors that no earlier stage had, by content hash
    SHA256SUMS, NN_pass/SHA256SUMS checksums of the other files; of the dump's own when it is done

A stage's folder is written under a temporary name and renamed, so it is there whole or not at
all. Tensors that equal those of the model's own folder are not copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from torch import Tensor

from panguq.errors import StorageError
from panguq.files.limits import OWN_BYTES
from panguq.files.manifest import open_regular, read_regular
from panguq.files.strict_json import parse_json
from panguq.files.whole_file import whole_file, write_file
from panguq.ir.interface import Interface
from panguq.tensors.safetensors_files import plan_shards

DUMP_JSON, STAGE_JSON, GRAPH_JSON = "dump.json", "stage.json", "graph.json"
SUMMARY, PROBE, TENSORS = "summary.txt", "probe.safetensors", "tensors.safetensors"
CALIBRATION, METADATA = "calibration.safetensors", "metadata.safetensors"
STAGE_NAME = re.compile(r"(?P<index>[0-9]{2,6})_(?P<name>[A-Za-z0-9_.-]+?)(?P<failed>\.FAILED)?")
COMPILE_AGAIN = "the dump is damaged or not panguq's; compile again with a dump folder"
_Model = TypeVar("_Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Environment(_Strict):
    """What the compile ran on."""

    panguq: str
    torch: str
    transformers: str
    python: str
    threads: int


class SourceTensor(_Strict):
    """A weight in the model's folder: its name there, and the dtype it was cast to."""

    name: str
    dtype: str


class ModelSource(_Strict):
    """The folder that the model came from, and which tensors it holds, by content hash."""

    path: str
    tensors: dict[str, SourceTensor]


class DumpInfo(_Strict):
    """`dump.json`: what was compiled, how, and on what."""

    format: Literal["panguq-dump"] = "panguq-dump"
    version: Literal[1] = 1
    recipe: dict[str, JsonValue]
    seed: int
    target: str
    interface: Interface
    environment: Environment
    model: ModelSource | None = None


class SiteInfo(_Strict):
    """A region that an exact pass rewrote, by labels."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class NodeMetadata(_Strict):
    """What passes left on nodes, by label: numbers of statistics and token weights, origins, and
    the schemes of single experts."""

    statistics: dict[str, int]
    split_from: dict[str, str]
    token_weights: dict[str, int] = {}
    merged: dict[str, tuple[str, ...]] = {}
    expert_schemes: dict[str, tuple[str, ...]] = {}


class StageInfo(_Strict):
    """`stage.json`: one pass and the graph after it (of a failed pass: before it).

    `options` are the pass's; `holds` the properties that hold; `renamed` maps new labels to
    those that the same nodes had before; `unsaved` says why there is no graph.json.
    """

    index: int
    name: str
    exact: bool
    options: dict[str, JsonValue]
    holds: tuple[str, ...]
    changed: int = 0
    seconds: float = 0.0
    sites: tuple[SiteInfo, ...] = ()
    renamed: dict[str, str] = {}
    weights: dict[str, str]
    graph_sha256: str = ""
    unsaved: str = ""
    metadata: NodeMetadata | None = None


# --- writing ----------------------------------------------------------------------------------


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """A file that is replaced at once: whoever reads it sees the old or the new one."""
    with whole_file(path) as partial:
        write_file(partial, chunks)


def tensor_chunks(tensors: Mapping[str, Tensor]) -> Iterable[memoryview]:
    """The bytes of one safetensors file. No two tensors may be the same one."""
    shards, aliases = plan_shards(tensors, 1 << 62)
    assert not aliases
    return shards[0].chunks() if shards else ()


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in memory of their own, since a file holds no two names for one tensor."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# --- reading ----------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """A regular file's bytes. Raises StorageError that names it."""
    try:
        return read_regular(path, OWN_BYTES)
    except StorageError as error:
        raise StorageError(error.message, COMPILE_AGAIN) from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}", COMPILE_AGAIN) from error


def read_text(path: Path) -> str:
    """A text file. Raises StorageError that names it."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise StorageError(f"{path}: not text: {error}", COMPILE_AGAIN) from error


def read_json_as(path: Path, kind: type[_Model]) -> _Model:
    """A JSON file as the model that it was written from. Raises StorageError that names it."""
    data = read_bytes(path)
    parse_json(data, str(path))  # refuses what pydantic would take: doubled keys, NaN
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StorageError(f"{path}: {where}: {first['msg']}", COMPILE_AGAIN) from error


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """These tensors of a safetensors file (default: all), memory-mapped.

    Raises StorageError that names the file.
    """
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read: {error}", COMPILE_AGAIN) from error


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file. Raises StorageError that names the file."""
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read: {error}", COMPILE_AGAIN) from error


def check_regular(path: Path) -> None:
    """Refuse links, devices and pipes, which a memory map would follow or wait for."""
    try:
        open_regular(path).close()
    except StorageError as error:
        raise StorageError(error.message, COMPILE_AGAIN) from error
