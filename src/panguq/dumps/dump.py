"""The pass-by-pass dump: an instrument that writes a readable folder as each pass ends.

    summary.txt   dump.json   probe.safetensors   00_trace/   01_canonicalize/   02_…

What lies in it is described in `files.py`. A dump is a diagnosis, so it never costs the
compile: if the disk fills up, dumping stops with a warning, what is complete stays readable,
and the compile goes on. A folder that cannot take a dump is refused before any work.
"""

from __future__ import annotations

import logging
import os
import platform
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import fx

from panguq.compile_report import CompileReport, PassSummary
from panguq.dumps import node_metadata
from panguq.dumps.files import (
    DUMP_JSON,
    PROBE,
    SUMMARY,
    DumpInfo,
    Environment,
    SiteInfo,
    StageInfo,
    copies,
    replace_file,
    tensor_chunks,
)
from panguq.dumps.folder import check_dump_folder, prepare_folder
from panguq.dumps.graph_diff import labels_by_name, renamed
from panguq.dumps.model_source import find_source
from panguq.dumps.stage_writer import StageWriter, model_text
from panguq.dumps.text import error_text, summary_text
from panguq.errors import StorageError, first_line
from panguq.files.checksums import write_checksums
from panguq.ir.edit import weights_of
from panguq.ir.properties import TRACED
from panguq.pass_options import pass_to_entry
from panguq.passes.pipeline.base import Pass, PassContext, PassResult
from panguq.passes.pipeline.runner import PassRecord
from panguq.recipe import Recipe

logger = logging.getLogger("panguq")
VARIABLE = "PANGUQ_DUMP"
TRACE = "00_trace"


def chosen_folder(dump_dir: str | Path | None) -> Path | None:
    """Where a dump is to go: `dump_dir`, by default `$PANGUQ_DUMP`; None for no dump.

    Raises StorageError if that place holds anything but an old dump.
    """
    chosen = dump_dir or os.environ.get(VARIABLE)
    if not chosen:
        return None
    folder = Path(chosen).resolve()
    check_dump_folder(folder)
    return folder


class Dump:
    """Writes a dump while a pipeline runs. `stopped` says why it ended early, if it did."""

    def __init__(
        self, folder: Path, info: DumpInfo, ctx: PassContext, summaries: Sequence[PassSummary]
    ) -> None:
        self.folder = folder
        self.info = info
        self.ctx = ctx
        self.summaries = summaries
        self.stopped: StorageError | None = None
        self._writer = StageWriter(folder)
        self._release: Callable[[], object] = lambda: None
        self._holds = TRACED
        self._lines: list[PassSummary] = []
        self._failure = ""
        self._has_probe = False
        self._names: dict[str, str] = {}
        self._metadata = node_metadata.NOTHING

    @staticmethod
    def open(
        dump_dir: str | Path | None,
        recipe: Recipe,
        seed: int,
        target: str,
        ctx: PassContext,
        summaries: Sequence[PassSummary] = (),
        traced: tuple[fx.GraphModule, Any] | None = None,
    ) -> Dump | None:
        """A dump into `dump_dir`, by default `$PANGUQ_DUMP`; None if neither is given.

        `summaries`: a list of the passes' lines; a pass's line is added before the dump is told of
        the pass. `traced`: the graph as it was traced, and its model, to begin with. Raises
        StorageError if the folder holds anything but an old dump, which is replaced.
        """
        folder = chosen_folder(dump_dir)
        if folder is None:
            return None
        handle = prepare_folder(folder)
        info = DumpInfo(
            recipe=recipe.to_data(),
            seed=seed,
            target=target,
            interface=ctx.interface,
            environment=_environment(),
        )
        dump = Dump(folder, info, ctx, summaries)
        dump._release = weakref.finalize(dump, os.close, handle)
        dump._attempt(dump._write_info)
        if traced is not None:
            dump.traced(*traced)
        return dump

    def traced(self, gm: fx.GraphModule, model: Any = None) -> None:
        """Write the graph as it was traced; `model` tells where its weights came from."""

        def write() -> None:
            source = find_source(model, weights_of(gm), self._writer.hashes(gm))
            self.info = self.info.model_copy(update={"model": source})
            self._writer.stored |= set(source.tensors) if source else set()
            self._write_info()
            trace = StageInfo(index=0, name="trace", exact=True, options={}, holds=(), weights={})
            self._writer.write(TRACE, trace, gm, PassResult())
            self._write_summary()

        self._attempt(write)

    def before_pass(self, index: int, step: Pass, gm: fx.GraphModule) -> None:
        """Remember what the pass is given."""
        self._names = labels_by_name(gm)
        self._metadata = node_metadata.collect(gm)
        self._attempt(self._write_probe)

    def after_pass(self, record: PassRecord, gm: fx.GraphModule) -> None:
        """Write the pass's folder and its line of the summary."""
        step, result = record.step, record.result
        self._holds = (self._holds - step.breaks) | step.establishes
        self._lines.append(self._summary_of(record))
        sites = (SiteInfo(inputs=site.inputs, outputs=site.outputs) for site in result.sites)
        info = self._stage_info(record.index, step).model_copy(
            update={
                "changed": result.changed,
                "seconds": record.seconds,
                "renamed": renamed(self._names, gm),
                "sites": tuple(sites),
            }
        )

        def write() -> None:
            self._write_probe()
            self._writer.write(record.folder, info, gm, result)
            self._write_summary()

        self._attempt(write)

    def failed_pass(self, index: int, step: Pass, error: BaseException) -> None:
        """Write what the pass was given, what happened, and how to see it again."""
        name = f"{index:02d}_{step.name}.FAILED"
        self._failure = f"{name}  {type(error).__name__}: {first_line(error)}"
        info = self._stage_info(index, step)
        said = error_text(self.folder, name, step, error)

        def write() -> None:
            self._writer.write_failed(name, info, said, self._metadata, self.ctx.batches)
            self._write_summary()
            self._seal()

        self._attempt(write)
        self._release()

    def close(self, report: CompileReport) -> None:
        """Add to the summary what the report says of the calibration data, and its warnings."""

        def write() -> None:
            self._write_summary(report)
            self._seal()

        self._attempt(write)
        self._release()

    # --- parts ----------------------------------------------------------------------------------

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write a piece of the dump; the first that cannot be written ends it with a warning."""
        if self.stopped is not None:
            return
        try:
            write()
        except (OSError, StorageError) as error:
            message = error.message if isinstance(error, StorageError) else str(error)
            self.stopped = StorageError(
                f"the dump in {self.folder} stops here: {message}",
                "what is in it can be read; free some space or choose another disk for the rest",
            )
            logger.warning(str(self.stopped))

    def _stage_info(self, index: int, step: Pass) -> StageInfo:
        entry = pass_to_entry(step)
        options = entry[step.name] if isinstance(entry, dict) else {}
        return StageInfo(
            index=index,
            name=step.name,
            exact=step.exact,
            options=cast(dict[str, JsonValue], options),
            holds=tuple(sorted(held.name for held in self._holds)),
            weights={},
        )

    def _write_info(self) -> None:
        replace_file(self.folder / DUMP_JSON, [model_text(self.info).encode()])

    def _write_probe(self) -> None:
        if self._has_probe or self.ctx.probe is None:
            return
        replace_file(self.folder / PROBE, tensor_chunks(copies(self.ctx.probe)))
        self._has_probe = True

    def _write_summary(self, report: CompileReport | None = None) -> None:
        text = summary_text(self.info, self._lines, self._failure, report)
        replace_file(self.folder / SUMMARY, [text.encode()])

    def _seal(self) -> None:
        names = [name for name in (DUMP_JSON, PROBE, SUMMARY) if (self.folder / name).exists()]
        write_checksums(self.folder, names)

    def _summary_of(self, record: PassRecord) -> PassSummary:
        """The line that a watching `Quality` wrote, with its SQNR; else one without."""
        if self.summaries and self.summaries[-1].name == record.folder:
            return self.summaries[-1]
        return PassSummary(
            name=record.folder,
            changed=record.result.changed,
            skipped=len(record.result.skipped),
            seconds=record.seconds,
            proved_difference=record.proved_difference,
        )


def _environment() -> Environment:
    return Environment(
        panguq=version("panguq"),
        torch=torch.__version__,
        transformers=version("transformers"),
        python=platform.python_version(),
        threads=torch.get_num_threads(),
    )
