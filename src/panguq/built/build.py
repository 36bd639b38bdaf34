"""Build a graph: its parts through the compiler, once each, into a folder of the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch.nn import functional

from panguq.built.bodies import bodies
from panguq.built.built_graph import (
    FORMAT,
    MODES,
    BuildPlan,
    BuiltGraph,
    entries_of,
    find_build,
    loaded,
)
from panguq.built.cache_folder import locked, make_cache_folder
from panguq.built.compile_part import CompilerError, ValueLayout, compile_part
from panguq.built.int8_sums import LIBRARY, compile_int8_sums
from panguq.built.parts import GraphPart, digest, part_module, stored_tensor
from panguq.data.inputs import prepare
from panguq.decibels import sqnr_db
from panguq.errors import LoweringError, PanguqError
from panguq.files.partial_folder import partial_folder
from panguq.ir.interface import Interface
from panguq.ir.ops.opset import Body, name_of
from panguq.ir.run.sweep import Progress
from panguq.kernels.cpu.int8_linear import int8_linear
from panguq.kernels.cpu.int8_weight_linear import aligned
from panguq.lowering.run.write_into_cache import written_into

logger = logging.getLogger("panguq")
_BUILDING = threading.Lock()  # the compiler's settings are the process's
_COMPARED_TOKENS = 256
_FEWEST_CALLS = 4  # a part of less, such as the rotary embedding of the first layer, gains nothing
_WRONG_DB = 20.0  # rounding ties of quantized inputs leave more; a wrong kernel leaves nothing


@dataclass(frozen=True)
class BuildReport:
    """What `build` did: where the code lies, how many libraries were compiled, in how many seconds
    (0 if they were there), and why what is not built is not. Of `compared` results of parts,
    `differing` are not the graph's to the last bit: there a value after them may round otherwise.
    """

    folder: Path | None
    libraries: int = 0
    seconds: float = 0.0
    reasons: tuple[str, ...] = ()
    compared: int = 0
    differing: int = 0

    @property
    def is_built(self) -> bool:
        """Whether compiled code runs."""
        return self.folder is not None


def build_graph(
    gm: fx.GraphModule, interface: Interface, progress: Progress
) -> tuple[BuiltGraph | None, BuildReport]:
    """The prepacked graph with its parts compiled, out of the cache or into it.

    Whatever prevents that is said in the report and in one warning, and None is returned: the graph
    then runs as it is.
    """
    started = time.monotonic()
    try:
        with _BUILDING, torch.no_grad():
            plan = BuildPlan.of(gm, interface)
            folder, libraries, reasons = _build(plan, progress)
            built, entries = loaded(plan, folder), entries_of(folder)
    except PanguqError as error:
        logger.warning("not built, the graph runs uncompiled: %s", error.message)
        return None, BuildReport(None, reasons=(error.message,))
    for reason in reasons:
        logger.warning("runs uncompiled: %s", reason)
    seconds = time.monotonic() - started if libraries else 0.0
    counts = entries["compared"], entries["differing"]
    return built, BuildReport(folder, libraries, seconds, tuple(reasons), *counts)


def _build(plan: BuildPlan, progress: Progress) -> tuple[Path, int, list[str]]:
    cache = make_cache_folder()
    with locked(cache, plan.name):
        folder = find_build(plan)
        if folder is not None:
            return folder, 0, []
        _check_compiler()
        target = cache / plan.name
        shutil.rmtree(target, ignore_errors=True)  # a damaged one
        with partial_folder(target, False) as partial, _work_folder(cache) as work:
            os.chmod(partial, 0o700)
            made = _libraries(plan, work, partial, progress)
            if not made.sums.keys() - {LIBRARY}:
                reasons = "; ".join(dict.fromkeys(made.reasons))
                raise LoweringError(reasons or "the graph has nothing to compile")
            entries = {
                "format": FORMAT, "modes": made.modes, "libraries": made.sums,
                "compared": made.compared, "differing": made.differing,
            }  # fmt: skip
            (partial / "built.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
            os.chmod(partial / "built.json", 0o600)  # whatever the user's umask is
        return target, len(made.sums), list(dict.fromkeys(made.reasons))


@dataclass
class _Made:
    modes: dict[str, list[dict[str, object] | None]]
    sums: dict[str, str]
    reasons: list[str]
    compared: int = 0
    differing: int = 0


def _libraries(plan: BuildPlan, work: Path, folder: Path, progress: Progress) -> _Made:
    """Compile every distinct part of every mode; what fails is left out, with the reason."""
    made = _Made({}, {}, [])
    own_sums = _own_sums(plan, folder, made)
    probes = {mode: [_values(plan, size) for size in _sizes(plan, mode)] for mode in MODES}
    texts = {mode: [_text(plan, p, mode, probes[mode]) for p in plan.parts] for mode in MODES}
    worth = [len(part.nodes) >= _FEWEST_CALLS for part in plan.parts]
    total = sum(len(set(compress(found, worth))) for found in texts.values())
    done = 0
    for mode in MODES:
        entries: dict[str, dict[str, object] | None] = {}
        for part, text, is_worth in zip(plan.parts, texts[mode], worth, strict=True):
            if text in entries:
                continue
            if not is_worth:
                entries[text] = None
                continue
            progress("building", done, total)
            done += 1
            name = f"{mode}-{digest(text)}.so"
            layouts = _layouts(part, probes[mode])
            try:
                body = bodies(few=mode == "few", own_sums=own_sums)
                library = work / name
                results = _compiled(plan, part, body, probes[mode], layouts, library)
                wanted = [probes[mode][-1][node] for node in part.results]
                differing = count_differing(wanted, results)
            except CompilerError:
                raise
            except LoweringError as error:
                made.reasons.append(f"a part of {len(part.nodes)} calls: {error.message}")
                entries[text] = None
                continue
            made.compared += sum(result.numel() for result in results)
            made.differing += differing
            shutil.move(library, folder / name)
            os.chmod(folder / name, 0o600)
            made.sums[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            entries[text] = {"library": name, "layouts": [asdict(layout) for layout in layouts]}
        made.modes[mode] = [entries[text] for text in texts[mode]]
    progress("building", total, total)
    return made


def _own_sums(plan: BuildPlan, folder: Path, made: _Made) -> bool:
    """Whether integer matmuls of few tokens have the library that they call; made if they need one.
    Without it they are fused, which is slower."""
    if not any(name_of(node.target) == name_of(int8_linear) for node in plan.gm.graph.nodes):
        return False
    try:
        compile_int8_sums(folder / LIBRARY)
    except LoweringError as error:
        (folder / LIBRARY).unlink(missing_ok=True)
        logger.info("integer matmuls of one token are fused: %s", error.message)
        return False
    os.chmod(folder / LIBRARY, 0o600)
    made.sums[LIBRARY] = hashlib.sha256((folder / LIBRARY).read_bytes()).hexdigest()
    return True


def _compiled(
    plan: BuildPlan,
    part: GraphPart,
    own: Mapping[Any, Body],
    probes: Sequence[Mapping[fx.Node, Tensor]],
    layouts: Sequence[ValueLayout],
    library: Path,
) -> list[Tensor]:
    """Write the library of a part, and what it gives for the last of the probes."""
    module = part_module(part, lambda target: own.get(target, target))
    weights = [aligned(stored_tensor(plan.gm, node)) for node in part.weights]
    first, *_, last = probes
    values = [layout.bring(first[node]) for layout, node in zip(layouts, part.inputs, strict=True)]
    plain = [ValueLayout(tuple(range(w.dim())), ()) for w in weights]
    compile_part(module, [*values, *weights], [*layouts, *plain], library)
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    given = [layout.bring(last[node]) for layout, node in zip(layouts, part.inputs, strict=True)]
    results: list[Tensor] = runner.run([*given, *weights])
    return results


def count_differing(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> int:
    """How many values differ in some bit. Raises LoweringError if they are not the same numbers up
    to rounding."""
    differing = 0
    for one, other in zip(wanted, found, strict=True):
        fits = other.shape == one.shape and other.dtype == one.dtype
        if not fits or not sqnr_db(one, other) > _WRONG_DB:
            raise LoweringError("its code gives other numbers than the graph")
        differing += int((one != other).sum())
    return differing


def _layouts(part: GraphPart, probes: Sequence[Mapping[fx.Node, Tensor]]) -> list[ValueLayout]:
    first, second, *_ = probes
    return [ValueLayout.of(first[node], second[node]) for node in part.inputs]


def _text(
    plan: BuildPlan, part: GraphPart, mode: str, probes: Sequence[Mapping[fx.Node, Tensor]]
) -> str:
    """The part with all that its code depends on."""
    layouts = dict(zip(part.inputs, _layouts(part, probes), strict=True))

    def describe(node: fx.Node) -> str:
        if node.op == "get_attr":
            return plan.describe(node)
        value, layout = probes[0][node], layouts[node]
        fixed = [None if axis in layout.varying else size for axis, size in enumerate(value.shape)]
        return f"{value.dtype} {fixed} {layout.order}"

    return f"{mode}\n{part.text(describe)}"


def _sizes(plan: BuildPlan, mode: str) -> list[tuple[int, int, int]]:
    """Batch, sequence and past of two calls that differ in every size that is to stay free, and of
    one to compare."""
    if mode == "many":
        return [(2, 5, 5), (3, 7, 7), (1, min(plan.few + 1, _COMPARED_TOKENS), 0)]
    if plan.few == 1:
        return [(1, 1, 5), (1, 1, 7), (1, 1, 6)]
    return [(2, 3, 5), (3, 5, 7), (1, 1, 6)]


def _values(plan: BuildPlan, size: tuple[int, int, int]) -> dict[fx.Node, Tensor]:
    """What the parts read and give in a call of these sizes, on seeded tokens and a seeded past."""
    kept = {node for part in plan.parts for node in (*part.inputs, *part.results)}
    found: dict[fx.Node, Tensor] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n in kept:
                found[n] = value
            return value

    Watching(plan.gm).run(*example_inputs(plan, *size))
    return found


def example_inputs(plan: BuildPlan, batch: int, seq: int, past: int) -> list[Any]:
    """Seeded inputs of the graph: `seq` new tokens a sequence after `past` random ones."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, plan.interface.vocab_size or 2, (batch, seq), generator=generator)
    held = [
        _random([batch, *(past if s is None else s for s in c.sizes)], c.dtype, generator)
        for c in plan.interface.cached_tensors()
    ]
    inputs = prepare(plan.interface, ids, past=held, empty_mask=plan.empty_mask)
    written = written_into(plan.gm)
    if not written:
        return list(inputs.values())
    for name in written:  # memory with room for the new tokens
        inputs[name] = functional.pad(inputs[name], (0, 0, 0, seq))
    return [*inputs.values(), past]


def _random(size: list[int], dtype: str, generator: torch.Generator) -> Tensor:
    kind = getattr(torch, dtype)
    if kind.is_floating_point:
        return torch.randn(size, generator=generator).to(kind)
    return torch.randint(-100, 100, size, generator=generator).to(kind)


def _check_compiler() -> None:
    """Raises LoweringError if this machine has no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # torch has an exception of its own for it
        raise LoweringError(
            "there is no C++ compiler", "install g++, or name yours in the variable CXX"
        ) from error


@contextmanager
def _work_folder(cache: Path) -> Iterator[Path]:
    """A folder of this user alone for all that the compiler writes, its own caches among them."""
    with (
        tempfile.TemporaryDirectory(prefix=".work-", dir=cache) as name,
        patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": f"{name}/torch"}),
    ):
        yield Path(name)
