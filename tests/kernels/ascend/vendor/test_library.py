"""With torch_npu there, its definitions stay; without it, panguq defines the ops."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from panguq.errors import LoweringError
from panguq.kernels.ascend.device import has_device, load_torch_npu

# What torch_npu does when it is loaded, for one op with a Meta kernel and one without.
TORCH_NPU = """
import torch
library = torch.library.Library("npu", "DEF")
library.define("npu_convert_weight_to_int4pack(Tensor weight, int inner_k_tiles=0) -> Tensor")
library.define(
    "npu_quantize(Tensor input, Tensor scales, Tensor? zero_points, int dtype, int axis=1,"
    " bool div_mode=True) -> Tensor"
)
library.impl("npu_quantize", lambda input, *rest: input.new_empty(77), "Meta")
library.impl("npu_quantize", lambda input, *rest: None, "PrivateUse1")
"""


def python(code: str, cwd: Path) -> list[str]:
    """What this code prints in a new interpreter that finds `cwd` first, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def with_torch_npu(tmp_path: Path) -> Path:
    """A folder with a module called torch_npu that defines two of the ops."""
    text = TORCH_NPU + "class npu:\n    is_available = staticmethod(lambda: True)\n"
    (tmp_path / "torch_npu.py").write_text(text, encoding="utf-8")
    return tmp_path


def test_torch_npus_own_definitions_stay(with_torch_npu: Path) -> None:
    code = """
import torch, torch_npu
from panguq.kernels.ascend.vendor import ops as npu_ops
from panguq.kernels.ascend.vendor.library import npu_op
from panguq.kernels.ascend.device import has_device, load_torch_npu
load_torch_npu()
quantize, pack = npu_ops.npu_quantize, npu_ops.npu_convert_weight_to_int4pack
print(npu_op(quantize).defined_here, npu_op(pack).defined_here)
print(npu_op(npu_ops.npu_quant_matmul).defined_here, has_device())
one = torch.ones(1)
print(quantize(torch.full((2, 8), 3.0), one, None, 12, -1, False).tolist()[0])
meta = torch.ones(2, 8, device="meta"), one.to("meta")
print(list(quantize(*meta, None, 12, -1, False).shape))
print(list(npu_op(quantize).fake(*meta, None, 12, -1, False).shape))
print(list(pack(torch.ones(2, 8, device="meta")).shape))
"""
    assert python(code, with_torch_npu) == [
        "False False",
        "True True",
        "[3, 3, 3, 3, 3, 3, 3, 3]",  # panguq's body on the CPU
        "[77]",  # torch_npu's Meta kernel
        "[2, 8]",  # panguq's fake, beside it
        "[2, 1]",  # panguq's fake, where torch_npu has none
    ]


def test_torch_npu_must_come_first(with_torch_npu: Path) -> None:
    code = """
from panguq.errors import LoweringError
from panguq.kernels.ascend.vendor import ops as npu_ops
from panguq.kernels.ascend.device import has_device, load_torch_npu
try: load_torch_npu()
except LoweringError as error: print(error.message); print(error.hint)
print(has_device())
"""
    message, hint, device = python(code, with_torch_npu)
    assert message == (
        "torch_npu is not loaded, and panguq has defined its ops for the CPU already"
    )
    assert hint.startswith("run `import torch_npu` before panguq compiles or loads a model")
    assert device == "False"


LOAD = """
from panguq.errors import LoweringError
from panguq.kernels.ascend.device import has_device, load_torch_npu
try: load_torch_npu()
except LoweringError as error: print(error.message)
print(has_device())
"""


def test_it_is_loaded_when_it_can_be(with_torch_npu: Path) -> None:
    assert python(LOAD, with_torch_npu) == ["True"]


@pytest.mark.parametrize(
    "text",
    [
        "raise ImportError('libhccl.so: cannot open shared object file')",
        "raise RuntimeError('Initialize:build/CMakeFiles')",
        "import a_module_that_is_not_there",
    ],
)
def test_it_cannot_be_loaded(text: str, tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text(text, encoding="utf-8")
    message, device = python(LOAD, tmp_path)
    assert message.startswith("torch_npu cannot be loaded: ")
    assert device == "False"


def test_it_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch_npu'\", name='torch_npu')",
        encoding="utf-8",
    )
    message, device = python(LOAD, tmp_path)
    assert message == "running on an NPU needs the package torch_npu, which is not installed"
    assert device == "False"


def test_nothing_of_panguq_imports_torch_npu(with_torch_npu: Path) -> None:
    code = (
        "import sys, panguq, panguq.kernels.ascend.vendor.ops, panguq.kernels.ascend.device;"
        "print('torch_npu' in sys.modules)"
    )
    assert python(code, with_torch_npu) == ["False"]


def test_here_there_is_no_device() -> None:
    if "torch_npu" in sys.modules:
        pytest.skip("torch_npu is loaded: this is about an environment without it")
    import panguq.kernels.ascend.vendor.ops  # noqa: F401

    assert not has_device()
    with pytest.raises(LoweringError, match="has defined its ops for the CPU already"):
        load_torch_npu()
