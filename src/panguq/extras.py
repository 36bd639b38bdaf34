"""Packages that panguq needs for some things only, and the extra that brings each."""

from __future__ import annotations

from importlib.util import find_spec

from panguq.errors import InputError, PanguqError

# Module: the package that has it, and the extra of pyproject.toml that installs it.
OPTIONAL = {
    "accelerate": ("accelerate", "gguf"),
    "datasets": ("datasets", "eval"),
    "gguf": ("gguf", "gguf"),
    "lm_eval": ("lm-eval", "eval"),
    "matplotlib": ("matplotlib", "plots"),
    "onnx": ("onnx", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "pyarrow": ("pyarrow", "data"),
    "ray": ("ray", "ray"),
    "sentencepiece": ("sentencepiece", "openpangu"),
    "torch_npu": ("torch_npu", "npu"),
    "triton": ("triton-ascend", "npu"),
}


def require(module: str, what: str, otherwise: str = "") -> None:
    """Raises InputError, which names the extra, where a module is not installed.

    what: that which needs it, as a sentence begins. otherwise: what else the user can do.
    """
    if find_spec(module) is None:
        raise missing(module, what, otherwise)


def missing(
    module: str, what: str, otherwise: str = "", kind: type[PanguqError] = InputError
) -> PanguqError:
    """The error for a module that is not installed; see `require`."""
    package, extra = OPTIONAL[module]
    instead = f", or {otherwise}" if otherwise else ""
    return kind(
        f"{what} needs the package {package}, which is not installed",
        f"pip install 'panguq[{extra}]'{instead}",
    )
