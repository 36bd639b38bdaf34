"""One part of a graph through torch's ahead-of-time compiler: a library whose inputs are the part's
values and weights, for any batch, length and past."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.exc import CppCompileError, InductorError
from torch.export import Dim

from panguq.built.int8_sums import SHIMS
from panguq.errors import LoweringError

_OPTIONS = {
    "cpp.dynamic_threads": True,  # the number of threads of the day, not of the build
    "emulate_precision_casts": True,  # round to bfloat16 wherever the graph does
    "aot_inductor.compile_wrapper_opt_level": "O1",
    "aot_inductor.custom_ops_to_c_shims": SHIMS,
}


class CompilerError(LoweringError):
    """The C++ compiler fails, which it will for other parts as well."""


@dataclass(frozen=True)
class ValueLayout:
    """How compiled code takes a value: the order of its axes in memory, outermost first, and which
    of its sizes vary."""

    order: tuple[int, ...]
    varying: tuple[int, ...]

    @staticmethod
    def of(first: Tensor, second: Tensor) -> ValueLayout:
        """What two values of one node, of two calls with no size in common, have in common."""
        axes = range(first.dim())
        # An axis of one element may have any stride; its place says where it belongs.
        order = sorted(axes, key=lambda axis: (-int(first.stride()[axis]), axis))
        sizes = zip(first.shape, second.shape, strict=True)
        varying = [axis for axis, (one, other) in enumerate(sizes) if one != other]
        return ValueLayout(tuple(order), tuple(varying))

    def bring(self, value: Tensor) -> Tensor:
        """The value, laid out so; copied only if it lies in another way."""
        if self.is_plain:
            return value if value.is_contiguous() else value.contiguous()
        turned = value.permute(self.order)
        if turned.is_contiguous():
            return value
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return turned.contiguous().permute(back)

    @property
    def is_plain(self) -> bool:
        """Whether the axes lie in their own order."""
        return self.order == tuple(range(len(self.order)))


def compile_part(
    module: fx.GraphModule, values: Sequence[Tensor], layouts: Sequence[ValueLayout], library: Path
) -> None:
    """Write the library of a part of a graph.

    `values` are example inputs, laid out as `layouts` say; their varying sizes are at least 2 and
    stay free. Raises LoweringError if the code would not serve other sizes, or if the compiler
    fails.
    """
    shapes = [{axis: Dim.AUTO for axis in layout.varying} for layout in layouts]
    try:
        with _quiet():
            program = torch.export.export(
                module, tuple(values), dynamic_shapes=tuple(shapes), strict=False
            )
            _check_free(program, layouts)
            options = {**_OPTIONS, "aot_inductor.output_path": str(library)}
            traced = program.module(check_guards=False)
            torch._inductor.aot_compile(traced, tuple(values), options=options)
    except LoweringError:
        raise
    except Exception as error:  # torch raises whatever it likes
        cause = error.inner_exception if isinstance(error, InductorError) else error
        if isinstance(cause, (CppCompileError, OSError)):
            raise CompilerError(f"the C++ compiler fails: {_shortened(cause)}") from error
        raise LoweringError(_shortened(error)) from error


def _check_free(program: Any, layouts: Sequence[ValueLayout]) -> None:
    given = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, layout in zip(given, layouts, strict=True):
        for axis in layout.varying:
            size = node.meta["val"].shape[axis]
            if isinstance(size, int):
                raise LoweringError(f"the code would hold for {size} alone on axis {axis}")
    for symbol, limits in program.range_constraints.items():
        if limits.lower > 2 or limits.upper < 2**31:
            raise LoweringError(f"the code would hold for {limits} alone, of size {symbol}")


def _shortened(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line] or lines or [type(error).__name__]
    return telling[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself while it compiles."""
    loud = [logging.getLogger(name) for name in ("torch._inductor", "torch.export")]
    levels = [logger.level for logger in loud]
    try:
        for logger in loud:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)
