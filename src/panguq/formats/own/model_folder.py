"""A compiled model as a folder, and back. See `storage.py` for how folders are written and checked.

    interface.json           what the graphs take and return
    recipe.yaml              the recipe, with every option of every pass
    report.json              what the compile did
    graph.<stage>.json       one graph a stage: nodes that name ops, weights and earlier nodes
    weights.safetensors      the weights of all stages, each once
    config.json …            for models of transformers: their configuration files
    tokenizer.json …         the tokenizer's own files, if the model has one

Only files that the manifest lists are read, each compared with its checksum; others are named in a
warning. Nothing that is read is executed: graphs name ops out of a fixed list, configurations are
data for classes that transformers itself ships, and there is no pickle.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from torch import fx

from panguq.artifact import Artifact, shared_weights
from panguq.compile_report import CompileReport
from panguq.errors import PanguqError, StorageError
from panguq.files.manifest import MANIFEST, SAVE_AGAIN
from panguq.files.plain_yaml import parse_yaml
from panguq.formats.own.storage import Folder, read_folder, write_folder
from panguq.ir.interface import Interface
from panguq.ir.text.serialize import from_text, to_text
from panguq.lowering import targets  # noqa: F401  (defines ops that files name)
from panguq.models.architectures import config_classes
from panguq.models.config import build_config, build_generation_config, plain_settings
from panguq.models.tokenizer_files import READ, tokenizer_files, tokenizer_of
from panguq.recipe import Recipe

logger = logging.getLogger("panguq")

_GRAPH = re.compile(r"graph\.([a-z][a-z-]*)\.json")
_Data = TypeVar("_Data", bound=BaseModel)


def save_model(artifact: Artifact, path: str | Path, overwrite: bool = False) -> None:
    """Write a compiled model as the folder `path`, whole or not at all.

    Equal models give equal bytes. Raises StorageError if there is something at `path` already
    (unless `overwrite` and panguq wrote it) or if it cannot be written.
    """
    files: dict[str, bytes | str] = {
        "interface.json": _json_text(artifact.interface),
        "recipe.yaml": artifact.recipe.to_yaml(),
        "report.json": _json_text(artifact.report),
    }
    for stage, graph in artifact.stages.items():
        files[f"graph.{stage}.json"] = to_text(graph)
    if artifact.config is not None:
        files["config.json"] = artifact.config.to_json_string(use_diff=True)
        if artifact.generation_config is not None:
            generation = artifact.generation_config.to_json_string(use_diff=True)
            files["generation_config.json"] = generation
        if artifact.tokenizer is not None:
            files |= tokenizer_files(artifact.tokenizer)
    write_folder(path, files, shared_weights(artifact.stages), overwrite)


def read_model(path: str | Path) -> Artifact:
    """What `save_model` wrote, its weights memory-mapped.

    Raises StorageError, naming the file, for anything missing, truncated, changed or from
    elsewhere.
    """
    folder = read_folder(path)
    _say_what_is_not_read(folder)
    interface = _read(folder, "interface.json", Interface)
    report = _read(folder, "report.json", CompileReport)
    recipe = _of_first_release(folder, _read_recipe(folder))
    stages = _read_stages(folder, interface)
    made = Artifact(stages, interface, recipe, report.target, report)
    if interface.kind == "module":
        return made
    return replace(
        made,
        config=_read_config(folder),
        generation_config=_read_generation_config(folder),
        tokenizer=_read_tokenizer(folder),
    )


def _json_text(data: BaseModel) -> str:
    return data.model_dump_json(indent=1) + "\n"


# --- reading ----------------------------------------------------------------------------------


def _read(folder: Folder, name: str, kind: type[_Data]) -> _Data:
    value = folder.json(name)
    try:
        return kind.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise _damaged(folder, name, _first_lines(error)) from error


def _read_recipe(folder: Folder) -> Recipe:
    where = str(folder.path / "recipe.yaml")
    try:
        data: Any = parse_yaml(folder.data("recipe.yaml"), where)
        return Recipe.of(data if isinstance(data, dict) else {})
    except StorageError:
        raise
    except PanguqError as error:
        raise StorageError(
            f"{where}: {error.message}",
            "it was compiled with passes that this panguq does not have; import what adds them, "
            "or compile the model again",
        ) from error


def _of_first_release(folder: Folder, recipe: Recipe) -> Recipe:
    """The recipe as release 0.1 meant it: its `precision: bfloat16`, the default, was of kernels of
    quantized weights, which the lowered graph names, and floats stayed float32."""
    if str(folder.manifest.get("panguq")).startswith("0.1.") and recipe.precision == "bfloat16":
        return recipe.model_copy(update={"precision": "float32"})
    return recipe


def _read_stages(folder: Folder, interface: Interface) -> dict[str, fx.GraphModule]:
    tensors = folder.tensors()
    stages = {}
    for name in sorted(folder.names):
        found = _GRAPH.fullmatch(name)
        if found is None:
            continue
        graph = from_text(folder.data(name), tensors, str(folder.path / name))
        inputs = tuple(str(n.target) for n in graph.graph.nodes if n.op == "placeholder")
        if inputs != interface.inputs:
            raise _damaged(folder, name, "its inputs are not those in interface.json")
        stages[found[1]] = graph
    if not stages:
        raise _damaged(folder, "graph.lowered.json", "there is no graph")
    return stages


def _read_config(folder: Folder) -> Any:
    """The configuration; of a model type that transformers does not know, its plain values."""
    from transformers import PretrainedConfig

    data = _object(folder, "config.json")
    model_type = str(data.get("model_type", ""))
    if model_type in config_classes():
        return build_config({**data, "model_type": model_type}, folder.path / "config.json")
    try:
        plain: Any = type("PlainConfig", (PretrainedConfig,), {"model_type": model_type})
        return plain.from_dict(plain_settings(data))
    except Exception as error:  # each configuration class checks its values in its own way
        raise _damaged(folder, "config.json", _first_lines(error)) from error


def _read_generation_config(folder: Folder) -> Any:
    name = "generation_config.json"
    if name not in folder.names:
        return None
    return build_generation_config(_object(folder, name), folder.path / name)


def _read_tokenizer(folder: Folder) -> Any:
    if "tokenizer_config.json" not in folder.names:
        return None
    names = [name for name in folder.names if Path(name).suffix in READ and not _is_own(name)]
    try:
        return tokenizer_of({name: folder.data(name) for name in names}, folder.path)
    except (PanguqError, OSError) as error:  # the model itself is whole, and runs on token ids
        logger.warning("no tokenizer: %s", getattr(error, "message", error))
        return None


def _is_own(name: str) -> bool:
    return name in ("interface.json", "report.json") or _GRAPH.fullmatch(name) is not None


def _say_what_is_not_read(folder: Folder) -> None:
    """Name files that were added to the folder, and that loaders of tokenizers would follow."""
    known = {MANIFEST, *folder.names}
    others = sorted(
        path.name
        for path in folder.path.iterdir()
        if path.name not in known and (path.suffix in READ or path.is_dir())
    )
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        logger.warning(
            "%s: not read: %s%s, which the model was not saved with",
            folder.path, ", ".join(others[:3]), more,
        )  # fmt: skip


def _object(folder: Folder, name: str) -> dict[str, Any]:
    value = folder.json(name)
    if not isinstance(value, dict):
        raise _damaged(folder, name, "not an object")
    return value


def _damaged(folder: Folder, name: str, why: str) -> StorageError:
    return StorageError(f"{folder.path / name}: {why}", SAVE_AGAIN)


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:300] if lines else type(error).__name__
