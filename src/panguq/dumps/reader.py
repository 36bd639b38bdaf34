"""Read a dump: its summary, its stages, and the graph of any stage with its weights.

Nothing that is read is executed, and everything is checked: graphs and weights against their
hashes, the rest against its form.
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, fx

from panguq.dumps.files import (
    CALIBRATION,
    COMPILE_AGAIN,
    DUMP_JSON,
    GRAPH_JSON,
    METADATA,
    PROBE,
    STAGE_JSON,
    STAGE_NAME,
    SUMMARY,
    TENSORS,
    DumpInfo,
    StageInfo,
    read_bytes,
    read_json_as,
    read_tensors,
    read_text,
    tensor_names,
)
from panguq.dumps.model_source import SourceFolder
from panguq.errors import StorageError
from panguq.files.checksums import check_listed
from panguq.ir.text.printer import content_hash
from panguq.ir.text.serialize import from_text
from panguq.lowering import targets  # noqa: F401  (defines ops that graphs name)
from panguq.passes.pipeline import runner as pipeline  # noqa: F401  (likewise)
from panguq.suggest import did_you_mean

FAILED = ".FAILED"


class DumpReader:
    """A dump folder. Raises StorageError, naming the file, for anything damaged or missing.

    `model_folder`: where the model's weights lie, if not where they lay when it was compiled.
    """

    def __init__(self, path: str | Path, model_folder: str | Path | None = None) -> None:
        self.path = Path(path).resolve()
        if not self.path.is_dir():
            raise StorageError(f"{self.path}: no such folder", "check the path")
        if not (self.path / DUMP_JSON).exists():
            raise StorageError(
                f"{self.path}: not a dump: it has no {DUMP_JSON}",
                "name the folder that was given as dump_dir, --dump or PANGUQ_DUMP",
            )
        self._checked: set[Path] = set()
        self._check(self.path)
        self.info = read_json_as(self.path / DUMP_JSON, DumpInfo)
        folder = Path(model_folder) if model_folder is not None else None
        self._source = SourceFolder(self.info.model, folder) if self.info.model else None
        self._stages = self._find_stages()
        self._places: dict[str, Path] | None = None
        self._tensors: dict[str, Tensor] = {}

    def summary(self) -> str:
        """`summary.txt`."""
        return read_text(self.path / SUMMARY)

    @property
    def stages(self) -> list[str]:
        """Names of the stages in order: `00_trace`, `01_canonicalize`, … `05_x.FAILED`."""
        return list(self._stages)

    @property
    def whole_stages(self) -> list[str]:
        """The stages without one that failed."""
        return [name for name in self._stages if not name.endswith(FAILED)]

    def find(self, limit: str | None = None) -> str:
        """The stage that an index (`3`), a pass name or a stage's full name means; None: the last.

        Of several passes with one name the last is meant. Raises StorageError if there is none.
        """
        if limit is None:
            if not self.whole_stages:
                raise StorageError(f"{self.path}: no pass has ended in this dump", COMPILE_AGAIN)
            return self.whole_stages[-1]
        for name in reversed(self.stages):
            index, rest = name.split("_", 1)
            digits = limit.isascii() and limit.isdigit()
            if limit in (name, rest, rest.removesuffix(FAILED)) or (
                digits and len(limit) < 10 and int(limit) == int(index)
            ):
                return name
        raise StorageError(
            f"{self.path}: there is no stage {limit!r}", did_you_mean(limit, self.stages, "stages")
        )

    def stage(self, stage: str) -> StageInfo:
        """`stage.json`."""
        return read_json_as(self._file(stage, STAGE_JSON), StageInfo)

    def graph(self, stage: str) -> fx.GraphModule:
        """The stage's graph with its weights; of a failed pass, the graph that it was given."""
        info = self.stage(stage)
        if info.unsaved:
            raise StorageError(
                f"{self.path / stage}: this graph can be read but not run: {info.unsaved}",
                "take the next stage",
            )
        path = self._file(stage, GRAPH_JSON)
        data = read_bytes(path)
        if hashlib.sha256(data).hexdigest() != info.graph_sha256:
            raise StorageError(f"{path}: its checksum is wrong: it was changed", COMPILE_AGAIN)
        weights = {name: self._tensor(digest) for name, digest in info.weights.items()}
        return from_text(data, weights, str(path))

    def probe(self) -> dict[str, Tensor]:
        """The probe input by input name."""
        if not (self.path / PROBE).exists():
            raise StorageError(
                f"{self.path / PROBE}: missing: the compile ended before it had calibration data",
                "the stages can be shown, but not run",
            )
        return self._inputs(read_tensors(self.path / PROBE), self.path / PROBE)

    def text(self, stage: str, glob: str | None = None) -> str:
        """`graph.txt`; with a glob, only the lines of nodes whose label matches it."""
        text = read_text(self._file(stage, "graph.txt"))
        if glob is None:
            return text
        lines = (line for line in text.splitlines() if line.startswith("%"))
        return "".join(f"{x}\n" for x in lines if fnmatchcase(x[1:].split(" : ", 1)[0], glob))

    def diff(self, stage: str) -> str:
        """`graph.diff`: what the pass changed. Empty for the trace and where nothing changed."""
        path = self._file(stage, "graph.diff")
        return read_text(path) if path.exists() else ""

    def error(self, stage: str) -> str:
        """`error.txt` of a failed pass; empty for others."""
        path = self._file(stage, "error.txt")
        return read_text(path) if path.exists() else ""

    def tables(self, stage: str) -> dict[str, str]:
        """The stage's tables as CSV text by name, `skipped` among them."""
        paths = sorted(self._file(stage, STAGE_JSON).parent.glob("*.csv"))
        return {path.stem: read_text(path) for path in paths}

    def batches(self, stage: str) -> list[dict[str, Tensor]]:
        """The calibration data that a failed pass was given."""
        path = self._file(stage, CALIBRATION)
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in sorted(self._optional(path).items()):
            number, _, name = key.partition("/")
            found.setdefault(number, {})[name] = tensor
        return [self._inputs(batch, path) for batch in found.values()]

    def metadata(self, stage: str) -> dict[str, Tensor]:
        """The tensors of what calibration had left on the graph that a failed pass was given."""
        return self._optional(self._file(stage, METADATA))

    # --- parts ----------------------------------------------------------------------------------

    def _find_stages(self) -> tuple[str, ...]:
        found = []
        for path in self.path.iterdir():
            match = STAGE_NAME.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found.append((int(match["index"]), path.name))
        return tuple(name for _, name in sorted(found))

    def _file(self, stage: str, name: str) -> Path:
        if stage not in self._stages:
            hint = did_you_mean(stage, self.stages, "stages")
            raise StorageError(f"{self.path}: there is no stage {stage!r}", hint)
        self._check(self.path / stage)
        return self.path / stage / name

    def _check(self, folder: Path) -> None:
        """Compare a folder's files with their checksums, once."""
        if folder in self._checked:
            return
        try:
            check_listed(folder)
        except StorageError as error:
            raise StorageError(error.message, COMPILE_AGAIN) from error
        except OSError as error:
            raise StorageError(f"{folder}: cannot be read: {error}", COMPILE_AGAIN) from error
        self._checked.add(folder)

    def _optional(self, path: Path) -> dict[str, Tensor]:
        has_any = path.exists() and path.stat().st_size > 0
        return read_tensors(path) if has_any else {}

    def _inputs(self, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        names = self.info.interface.inputs
        if set(tensors) != set(names):
            raise StorageError(f"{path}: holds {sorted(tensors)!s:.120}", COMPILE_AGAIN)
        return {name: tensors[name] for name in names}

    def _tensor(self, digest: str) -> Tensor:
        """The tensor with this hash, from the stage that made it or from the model's folder."""
        if digest not in self._tensors:
            self._tensors[digest] = self._read_tensor(digest)
        return self._tensors[digest]

    def _read_tensor(self, digest: str) -> Tensor:
        if self._places is None:
            paths = [self.path / stage / TENSORS for stage in self._stages]
            self._places = {n: path for path in paths if path.exists() for n in tensor_names(path)}
        if digest in self._places:
            path = self._places[digest]
            tensor = read_tensors(path, [digest])[digest]
            if content_hash(tensor) != digest:
                raise StorageError(f"{path}: tensor {digest[:10]} was changed", COMPILE_AGAIN)
            return tensor
        if self._source is not None and digest in self._source.source.tensors:
            return self._source.tensor(digest)
        raise StorageError(f"{self.path}: tensor {digest[:10]} is missing", COMPILE_AGAIN)
