"""Write the folder of one stage of a dump: whole, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel
from torch import Tensor, fx

from panguq.dumps.files import (
    CALIBRATION,
    GRAPH_JSON,
    METADATA,
    STAGE_JSON,
    TENSORS,
    NodeMetadata,
    StageInfo,
    copies,
    tensor_chunks,
)
from panguq.dumps.graph_diff import graph_diff
from panguq.dumps.text import csv_text
from panguq.errors import StorageError
from panguq.files.checksums import write_checksums
from panguq.files.partial_folder import MARKER, partial_folder
from panguq.files.whole_file import write_file
from panguq.ir.edit import weights_of
from panguq.ir.text.printer import Hasher, print_graph
from panguq.ir.text.serialize import to_text
from panguq.passes.pipeline.base import PassResult, Table


@dataclass(frozen=True)
class Written:
    """A stage as it was written, which the next one is compared with, or fails on."""

    stage: str = ""
    text: str = ""
    graph: str = ""
    unsaved: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)


class StageWriter:
    """Writes stage after stage into a dump, each tensor only once. Raises OSError."""

    def __init__(self, dump: Path) -> None:
        self.dump = dump
        self.last = Written()
        self.stored: set[str] = set()
        self._hasher = Hasher()

    def hashes(self, gm: fx.GraphModule) -> dict[str, str]:
        """The content hash of every weight of a graph, by name."""
        return {name: self._hasher(tensor) for name, tensor in weights_of(gm).items()}

    def write(self, name: str, info: StageInfo, gm: fx.GraphModule, result: PassResult) -> None:
        """The stage `name`: the graph after a pass, what the pass did, and the new tensors."""
        weights, hashes = weights_of(gm), self.hashes(gm)
        graph, unsaved = _as_json(gm)
        written = Written(name, print_graph(gm, self._hasher), graph, unsaved, hashes)
        files = _graph_files(written, info)
        if self.last.text:
            titles = (self.last.stage, name)
            files["graph.diff"] = graph_diff(self.last.text, written.text, info.renamed, titles)
        skipped = tuple((skip.node, skip.reason) for skip in result.skipped)
        tables = {**result.tables, "skipped": Table(("node", "reason"), skipped)}
        files |= {f"{key}.csv": csv_text(table) for key, table in tables.items()}
        new = {hashes[key]: weights[key] for key in weights if hashes[key] not in self.stored}
        with partial_folder(self.dump / name, overwrite=False) as folder:
            _write_texts(folder, files)
            if new:
                write_file(folder / TENSORS, tensor_chunks(new))
            _seal(folder)
        self.stored |= set(new)
        self.last = written

    def write_failed(
        self,
        name: str,
        info: StageInfo,
        error: str,
        metadata: tuple[NodeMetadata, Mapping[str, Tensor]],
        batches: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """The stage of a failed pass: all that it was given, and `error`, what came of it."""
        files = _graph_files(self.last, info.model_copy(update={"metadata": metadata[0]}))
        inputs = {
            f"{number:06d}/{key}": tensor
            for number, batch in enumerate(batches)
            for key, tensor in batch.items()
        }
        with partial_folder(self.dump / name, overwrite=False) as folder:
            _write_texts(folder, files | {"error.txt": error})
            write_file(folder / METADATA, tensor_chunks(copies(metadata[1])))
            write_file(folder / CALIBRATION, tensor_chunks(copies(inputs)))
            _seal(folder)


def model_text(model: BaseModel) -> str:
    """A model as a JSON file."""
    return model.model_dump_json(indent=1) + "\n"


def _graph_files(of: Written, info: StageInfo) -> dict[str, str]:
    update = {
        "weights": dict(of.weights),
        "unsaved": of.unsaved,
        "graph_sha256": hashlib.sha256(of.graph.encode()).hexdigest(),
    }
    stage = model_text(info.model_copy(update=update))
    return {"graph.txt": of.text, GRAPH_JSON: of.graph, STAGE_JSON: stage}


def _as_json(gm: fx.GraphModule) -> tuple[str, str]:
    """The graph as a file may hold it; or none and why, for a trace with ops beyond the opset."""
    try:
        return to_text(gm), ""
    except StorageError as error:
        return "", error.message


def _seal(folder: Path) -> None:
    """List the checksums of all but the tensors, which are named by their own."""
    names = {path.name for path in folder.iterdir()} - {TENSORS, MARKER}
    write_checksums(folder, names)


def _write_texts(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        if text:
            write_file(folder / name, [text.encode()])
