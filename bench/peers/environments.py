"""The virtual environments of the peers, made once and apart from panguq's own."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from conformance.environment import ROOT, TORCH
from conformance.gptqmodel import environment as gptqmodel
from conformance.msmodelslim import environment as msmodelslim
from conformance.msmodelslim.environment import run


@dataclass(frozen=True)
class Peer:
    """A quantizer: what pip installs, and how it is run.

    `variables` are added to the process's environment. `folder` is the environment's name.
    """

    name: str
    script: str
    folder: str = ""
    packages: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


PANGUQ = Peer("panguq", "quantize_panguq")
GPTQMODEL = Peer(
    "GPTQModel",
    "quantize_gptqmodel",
    ".venv-gptqmodel",
    variables=(("GPTQMODEL_CPU_WORKERS", "2"),),
)
LLM_COMPRESSOR = Peer(
    "llm-compressor", "quantize_llm_compressor", ".venv-llmcompressor", ("llmcompressor==0.14.0.1",)
)
MSMODELSLIM = Peer("msModelSlim", "quantize_msmodelslim", ".venv-msmodelslim", msmodelslim.PINNED)
PEERS = (GPTQMODEL, LLM_COMPRESSOR, MSMODELSLIM)


def make_environment(peer: Peer, root: Path = ROOT, torch: str = TORCH) -> Path:
    """The peer's Python; its environment is made unless it is there, complete and of these pins.

    Raises Unavailable for what cannot be installed here.
    """
    if peer is PANGUQ:
        return Path(sys.executable)
    folder = (root / peer.folder).absolute()
    if peer is GPTQMODEL:
        return gptqmodel.make_environment(folder, torch)
    if peer is MSMODELSLIM:
        return msmodelslim.make_environment(folder, torch).python
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = "\n".join((torch, *peer.packages))
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {folder} with {torch} and {peer.name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    run("creating a virtual environment", sys.executable, "-m", "venv", str(folder))
    pip = (str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(f"installing {torch}", *pip, *torch.split())
    run(f"installing what {peer.name} needs", *pip, *peer.packages)
    ready.write_text(wanted, encoding="utf-8")
    return python
