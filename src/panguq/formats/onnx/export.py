"""Export to ONNX, to look at in Netron and to run in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import fx

from panguq.artifact import LOWERED, Artifact
from panguq.extras import require
from panguq.ir.interface import Interface

if TYPE_CHECKING:
    from panguq.dumps.reader import DumpReader


def export_onnx(
    artifact: Artifact,
    path: str | Path,
    stage: str = LOWERED,
    overwrite: bool = False,
    functions: bool = False,
) -> None:
    """Write a stage of a compiled model (`lowered` or `fake-quant`) as an ONNX file.

    Values and nodes have the labels of the graph; batch, sequence and past are dynamic; inputs and
    outputs are those of `artifact.interface`, 16-bit floats as float32. Weights of more than 64 MiB
    lie in `<path>.data` beside it. With `functions`, what belongs to one op, and to one layer, is
    one box that opens on a click (ONNX local functions). Raises StorageError if one of the two
    exists (unless `overwrite`) or cannot be written, and an error that names op and label for what
    ONNX lacks.
    """
    about = {"recipe": artifact.recipe.name, "stage": stage, "target": artifact.target}
    graph = artifact.graph(stage)
    export_graph(graph, artifact.interface, path, overwrite, artifact.target, about, functions)


def export_dump(
    reader: DumpReader,
    path: str | Path,
    stage: str | None = None,
    overwrite: bool = False,
    functions: bool = False,
) -> str:
    """Write a stage of a dump (None: the last) as `export_onnx` does; returns the stage's name."""
    name = reader.find(stage)
    about = {
        "recipe": str(reader.info.recipe.get("name", "")),
        "stage": name,
        "target": reader.info.target,
    }
    graph = reader.graph(name)
    interface, target = reader.info.interface, reader.info.target
    export_graph(graph, interface, path, overwrite, target, about, functions)
    return name


def export_graph(
    graph: fx.GraphModule,
    interface: Interface,
    path: str | Path,
    overwrite: bool = False,
    target: str | None = None,
    about: Mapping[str, str] | None = None,
    functions: bool = False,
) -> None:
    """Write any graph, with what `interface` says it takes and returns; see `export_onnx`.

    `target` is what it was lowered for: kernels then carry the time that the cost model predicts.
    `about` goes into the file's metadata.
    """
    require("onnx", "ONNX export")
    from panguq.formats.onnx.choices import kernel_notes
    from panguq.formats.onnx.files import check_free, write_onnx
    from panguq.formats.onnx.functions import fold_into_functions
    from panguq.formats.onnx.model import build

    check_free(Path(path), overwrite)
    written = {f"panguq.{key}": value for key, value in (about or {}).items()}
    name = written.get("panguq.stage", "graph")
    made = build(graph, interface, name, kernel_notes(target), written)
    if functions:
        made = fold_into_functions(made)
    write_onnx(made, Path(path), overwrite)
