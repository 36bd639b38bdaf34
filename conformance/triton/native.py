"""The linalg of a kernel as native code for this machine, by stock MLIR 19, called through ctypes.

So the numbers of triton-ascend's lowering can be compared with a reference. What AscendNPU IR makes
of the same linalg for an NPU is not run here.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from conformance.triton.linalg import linalg_of
from conformance.triton.variants import Variant

# Tensors to buffers, linalg to loops, then every dialect to LLVM's.
_PASSES = (
    "convert-elementwise-to-linalg",
    "eliminate-empty-tensors",
    "empty-tensor-to-alloc-tensor",
    "one-shot-bufferize{allow-return-allocs-from-loops=true}",
    "func.func(convert-linalg-to-loops)",
    "func.func(arith-expand{include-bf16=true})",
    "lower-affine",
    "convert-scf-to-cf",
    "func.func(memref-expand)",
    "expand-strided-metadata",
    "lower-affine",
    "convert-math-to-llvm",
    "convert-math-to-libm",
    "convert-index-to-llvm",
    "convert-arith-to-llvm",
    "finalize-memref-to-llvm",
    "convert-func-to-llvm",
    "convert-cf-to-llvm",
    "reconcile-unrealized-casts",
)
Grid = tuple[int, int, int]


def mlir_folder() -> Path | None:
    """Where Debian's MLIR 19 is unpacked; None if it is not there."""
    folder = Path(os.environ.get("PANGUQ_MLIR", "")) / "usr/lib/llvm-19"
    return folder if (folder / "bin" / "mlir-opt").exists() else None


def _run(folder: Path, *command: str | Path) -> None:
    libraries = f"{folder / 'lib'}:{folder.parent / 'x86_64-linux-gnu'}"
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "LD_LIBRARY_PATH": libraries},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command[0]}:\n{done.stderr[:2000]}"


class NativeKernel:
    """A kernel at a tile, built into `folder`."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        mlir = mlir_folder()
        assert mlir is not None
        stem = folder / variant.name
        source, lowered, code, obj, library = (
            Path(f"{stem}{end}") for end in (".mlir", ".llvm.mlir", ".ll", ".o", ".so")
        )
        source.write_text(linalg_of(variant), encoding="utf-8")
        pipeline = f"--pass-pipeline=builtin.module({','.join(_PASSES)})"
        _run(mlir, mlir / "bin/mlir-opt", source, pipeline, "-o", lowered)
        _run(mlir, mlir / "bin/mlir-translate", lowered, "--mlir-to-llvmir", "-o", code)
        options = ("-O2", "-relocation-model=pic", "-filetype=obj")
        _run(mlir, mlir / "bin/llc", *options, code, "-o", obj)
        # MLIR's own run-time library would load LLVM beside the one in triton-ascend.
        runtime = Path(__file__).parent / "memref_copy.c"
        _run(mlir, "cc", "-O2", "-fPIC", "-shared", obj, runtime, "-o", library, "-lm")
        self._function = getattr(ctypes.CDLL(str(library)), variant.kernel)
        self._function.restype = None

    def __call__(self, grid: Grid, *arguments: Tensor | int, order: int | None = None) -> None:
        """Run every program of the grid; with `order`, in a random order of this seed.

        Arguments as in the kernel's signature: without absent pointers and constants.
        """
        # Two buffers for synchronization and workspace come first; a single program uses neither.
        values = [*_memref(None), *_memref(None)]
        for argument in arguments:
            if isinstance(argument, Tensor):
                values += _memref(argument)
            else:
                values.append(ctypes.c_int32(argument))
        programs = list(itertools.product(*map(range, grid)))
        if order is not None:
            random.Random(order).shuffle(programs)
        for program in programs:
            self._function(*values, *(ctypes.c_int32(number) for number in (*grid, *program)))


def _memref(tensor: Tensor | None) -> list[ctypes.c_void_p | ctypes.c_int64]:
    """A one-dimensional buffer: its address twice, offset, size, stride."""
    if tensor is not None:
        assert tensor.is_contiguous()
    address = ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
    size = 0 if tensor is None else tensor.numel()
    return [address, address, *(ctypes.c_int64(number) for number in (0, size, 1))]


def random_int8(*shape: int) -> Tensor:
    """Codes of the whole range."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)
