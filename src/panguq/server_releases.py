"""Which releases of the servers panguq's tables know, and how one is asked for.

One spelling everywhere: `NAME`, which means the newest release known, or `NAME==VERSION`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from panguq.errors import InputError

Server: TypeAlias = Literal["vllm-ascend", "mindie", "sglang", "vllm", "transformers"]
SERVERS: tuple[Server, ...] = ("vllm-ascend", "mindie", "sglang", "vllm", "transformers")
MAIN = "main"
"""The main branch of a server's repository, as it was in August 2026; no release."""


@dataclass(frozen=True)
class Release:
    """One release of a server. `version` is a prefix: 0.23 stands for 0.23.0.post1, too. `known`
    says how its entries came about: whether its loader was run on what panguq writes, and where."""

    server: Server
    version: str
    known: str

    def __str__(self) -> str:
        return f"{self.server}=={self.version}"

    def has(self, version: str) -> bool:
        """Whether a version, in full or as a prefix, is this release."""
        return version == self.version or version.startswith(f"{self.version}.")


_READ = "read in its sources, not run"
# Of each server the oldest first.
RELEASES = (
    Release("vllm-ascend", "0.18", _READ),
    Release("vllm-ascend", "0.23", "run on CPU tensors (conformance.servers), not on an NPU"),
    Release("vllm-ascend", MAIN, _READ),
    Release("mindie", MAIN, _READ),
    Release("sglang", "0.5.23", f"its path for NPUs, {_READ}"),
    Release("vllm", "0.23", _READ),
    Release("vllm", "0.32", "run on a CPU; its kernels for GPUs read in its sources"),
    Release("transformers", "4.57", "run on a CPU with compressed-tensors 0.13"),
    Release("transformers", "5.24", "run on a CPU with compressed-tensors 0.20 and GPTQModel 7.7"),
)


def split_server(asked: str) -> tuple[str, str | None]:
    """Name and version of `NAME` or `NAME==VERSION`. Raises InputError for another spelling."""
    found = re.fullmatch(rf"([A-Za-z][\w-]*)(?:==(?:v?([0-9][\w.+]*)|({MAIN})))?", asked.strip())
    if found is None:
        raise InputError(
            f"server {asked!r:.80}: is neither NAME nor NAME==VERSION", "vllm-ascend==0.23"
        )
    return found[1].lower(), found[2] or found[3]


def find_server(asked: str) -> Server:
    """The server of `NAME` or `NAME==VERSION`, whatever the version is. Raises InputError for one
    that panguq knows nothing of."""
    name, _ = split_server(asked)
    for server in SERVERS:
        if server == name:
            return server
    raise InputError(f"unknown server {name!r:.80}", f"the servers are {', '.join(SERVERS)}")


def find_release(asked: str) -> Release:
    """The release of `NAME` or `NAME==VERSION`; of NAME the newest that was released.

    Raises InputError for a server, or a version of it, that panguq knows nothing of.
    """
    server, version = find_server(asked), split_server(asked)[1]
    known = [release for release in RELEASES if release.server == server]
    if version is None:
        return next((r for r in reversed(known) if r.version != MAIN), known[-1])
    for release in known:
        if release.has(version):
            return release
    raise InputError(
        f"panguq does not know what {server} {version:.40} takes",
        f"it knows {', '.join(map(str, known))}; {server} alone stands for the newest release",
    )
