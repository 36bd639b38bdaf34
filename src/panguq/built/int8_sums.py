"""Integer sums of one token, in C++ of our own: a library beside those of the parts, which call it.

torch's compiler reads an int8 weight at half the memory's speed when it fuses the sum, and its code
for `torch._int_mm` is wrong for one token on processors with AMX.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler

from panguq.built.machine import cpu_features
from panguq.errors import LoweringError
from panguq.ir.ops.opset import define_op
from panguq.kernels.cpu.int8_linear import NAMESPACE, int32_matmul

LIBRARY = "int8_sums.so"
_NEEDED = ("avx512f", "avx512bw", "avx512_vnni")
_SOURCE = Path(__file__).with_name("int8_sums.cpp")


def _fake_int8_sums(codes: Tensor, weight: Tensor) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=torch.int32)


@define_op(
    "int8_sums(Tensor codes, Tensor weight) -> Tensor", fake=_fake_int8_sums, namespace=NAMESPACE
)
def int8_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """sum_k codes * weight, exact: int8 [m, k] and int8 [n, k] -> int32 [m, n]."""
    return int32_matmul(codes, weight)


SHIMS = {
    int8_sums: [
        "AOTITorchError aoti_torch_cpu_int8_sums(AtenTensorHandle, AtenTensorHandle,"
        " AtenTensorHandle*)"
    ]
}
"""How code of torch's compiler calls the library."""


def compile_int8_sums(library: Path) -> None:
    """Compile the library, load it and compare it with int64 sums of extreme codes.

    Raises LoweringError if this processor or compiler cannot have it, or its sums are wrong.
    """
    missing = [name for name in _NEEDED if name not in cpu_features()]
    if missing:
        raise LoweringError(f"the processor has no {', '.join(missing)}")
    torch_folder = Path(torch.__file__).parent
    command = [
        get_cpp_compiler(), str(_SOURCE), "-o", str(library), "-O3", "-march=native", "-std=c++17",
        "-fPIC", "-shared", "-fopenmp", f"-I{torch_folder}/include", f"-L{torch_folder}/lib",
        "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise LoweringError(f"the C++ compiler fails: {lines[0].strip()[:200]}")
    loaded = load_int8_sums(library)
    for m, n, k in ((1, 9, 1), (1, 64, 64), (1, 7, 1000), (3, 6, 130)):
        codes = torch.tensor([-128, 127, -1, 127]).repeat(m * k)[: m * k].reshape(m, k)
        weight = torch.tensor([-128, 127, 127, -128, 5]).repeat(n * k)[: n * k].reshape(n, k)
        if not torch.equal(sums_of(loaded, codes.char(), weight.char()).long(), codes @ weight.t()):
            raise LoweringError("its sums are wrong on this processor")


def load_int8_sums(library: Path) -> ctypes.CDLL:
    """Load the library, so that parts that are loaded later find its function."""
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def sums_of(loaded: ctypes.CDLL, codes: Tensor, weight: Tensor) -> Tensor:
    """What `int8_sums` documents, by the library."""
    found = torch.empty((codes.shape[0], weight.shape[0]), dtype=torch.int32)
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes, weight, found)]
    sizes = [ctypes.c_int64(size) for size in (*found.shape, codes.shape[1])]
    loaded.panguq_int8_sums(*places, *sizes)
    return found
