"""The one place that imports torch_npu."""

from __future__ import annotations

import importlib
import sys

import torch

from panguq.errors import LoweringError
from panguq.extras import missing


def load_torch_npu() -> None:
    """Make sure that torch_npu is loaded. Raises LoweringError if it cannot be.

    On a machine set up for it, `import torch` has loaded it already and this does nothing.
    """
    if "torch_npu" in sys.modules:
        return
    # Two definitions of one op are an error inside PyTorch, half way through loading torch_npu.
    if any(schema.name.startswith("npu::") for schema in torch._C._jit_get_all_schemas()):
        raise LoweringError(
            "torch_npu is not loaded, and panguq has defined its ops for the CPU already",
            "run `import torch_npu` before panguq compiles or loads a model for an Ascend target;"
            " PyTorch does so itself unless TORCH_DEVICE_BACKEND_AUTOLOAD=0",
        )
    try:
        importlib.import_module("torch_npu")
    except ModuleNotFoundError as error:
        if error.name != "torch_npu":
            raise _cannot_load(error) from error
        otherwise = "run the model on a CPU, slowly"
        raise missing("torch_npu", "running on an NPU", otherwise, LoweringError) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise _cannot_load(error) from error


def _cannot_load(error: Exception) -> LoweringError:
    return LoweringError(
        f"torch_npu cannot be loaded: {error}",
        "install CANN and run its set_env.sh in this shell, then try `import torch_npu`",
    )


def has_device() -> bool:
    """Whether torch_npu is loaded and sees an NPU. Loads nothing."""
    torch_npu = sys.modules.get("torch_npu")
    return torch_npu is not None and bool(torch_npu.npu.is_available())


def require_device() -> None:
    """Raises LoweringError unless torch_npu is loaded, or can be, and sees an NPU."""
    load_torch_npu()
    if not has_device():
        raise LoweringError(
            "torch_npu is loaded but sees no NPU",
            "check that `npu-smi info` lists one and that this process may use it",
        )
