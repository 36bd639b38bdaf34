"""Will a server take this folder? Checks of checkpoints that panguq or another tool wrote.

No server runs here: what their loaders look up, and in which form, is written down as rules
(`files`, `ascend`, `compressed_tensors`), each with the servers that fail
without it. A folder that keeps them all may still be refused for what no rule knows of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from panguq.check import weight_only
from panguq.check.ascend import ASCEND_RULES, tensor_types
from panguq.check.compressed_tensors import COMPRESSED_TENSORS_RULES
from panguq.check.config_groups import quantized
from panguq.check.files import FILE_RULES, CheckedFolder, Rule, open_folder
from panguq.check.unchanged import UNCHANGED, UNCHANGED_RULES, UNKNOWN
from panguq.files.checksums import CHECKSUMS
from panguq.server_models import class_answer
from panguq.server_releases import SERVERS, Server, find_release, find_server
from panguq.servers import READS

FolderKind = Literal["ascend", "compressed-tensors", "gptq", "awq", "float"]
ServerAnswer = Literal["takes", "refuses", "not known", "does not read this format"]
RULES: dict[FolderKind, tuple[Rule, ...]] = {
    "ascend": (*FILE_RULES, *UNCHANGED_RULES, *ASCEND_RULES),
    "compressed-tensors": (*FILE_RULES, *UNCHANGED_RULES, *COMPRESSED_TENSORS_RULES),
    "gptq": (*FILE_RULES, *UNCHANGED_RULES, *weight_only.WEIGHT_ONLY_RULES),
    "awq": (*FILE_RULES, *UNCHANGED_RULES, *weight_only.WEIGHT_ONLY_RULES),
    "float": (*FILE_RULES, *UNCHANGED_RULES),
}
_SHOWN = 5


class Finding(BaseModel):
    """A rule that the folder breaks at a tensor (or module, or file). `breaks`: the servers that
    refuse it or compute something else; none: a note."""

    model_config = ConfigDict(frozen=True)
    rule: str
    tensor: str
    message: str
    breaks: tuple[str, ...]
    source: str


class CheckReport(BaseModel):
    """What a folder is, what is wrong with it, and which server will take it.

    `has_checksums`: it lists what its files were when they were written, and they were compared.
    `unknown`: why, for each server with the answer "not known".
    """

    model_config = ConfigDict(frozen=True)
    path: str
    format: FolderKind
    types: dict[str, int]
    has_checksums: bool
    findings: tuple[Finding, ...]
    servers: dict[str, ServerAnswer]
    unknown: dict[str, str] = {}

    def refused_by(self, server: str | None = None) -> bool:
        """Whether that server would not take the folder, as far as is known; None: whether any
        that reads its format would surely not."""
        if server is None:
            return "refuses" in self.servers.values()
        return self.servers[find_server(server)] != "takes"

    def render(self, server: str | None = None) -> str:
        """The report as text: findings of one rule together, then the verdicts."""
        server = None if server is None else find_server(server)
        counts = ", ".join(f"{count} {kind}" for kind, count in self.types.items())
        lines = [f"{self.path}: {self.format}{f' ({counts})' if counts else ''}"]
        by_rule: dict[tuple[str, tuple[str, ...]], list[Finding]] = {}
        for finding in self.findings:
            if server is None or not finding.breaks or server in finding.breaks:
                by_rule.setdefault((finding.rule, finding.breaks), []).append(finding)
        for (rule, breaks), found in sorted(by_rule.items(), key=lambda item: not item[0][1]):
            who = ", ".join(breaks)
            lines.append(f"{rule}: breaks {who}" if breaks else f"{rule}: a note")
            lines += [f"  {finding.tensor}: {finding.message}" for finding in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"  and {len(found) - _SHOWN} more")
        if not self.has_checksums:
            lines.append(UNKNOWN)
        elif all(finding.rule != "changed-file" for finding in self.findings):
            lines.append(UNCHANGED)
        asked = self.servers if server is None else {server: self.servers[server]}
        lines += [
            f"{name}: {verdict}" + (f" ({self.unknown[name]})" if name in self.unknown else "")
            for name, verdict in asked.items()
        ]
        return "\n".join(lines)


def check_folder(path: str | Path, server: str | None = None) -> CheckReport:
    """Check a checkpoint's folder against what loaders do with it.

    server: `NAME` or `NAME==VERSION`, whose release is meant where it is not the newest one known.
    The format follows from the files: quant_model_description.json or quant_model_weight*, or a
    quantization_config in config.json. Raises StorageError if there is no such folder, InputError
    for a server or a version that panguq knows nothing of; anything wrong inside the folder is a
    finding.
    """
    folder = open_folder(path)
    if server is not None:
        release = find_release(server)
        folder.versions[release.server] = release.version
    kind = _kind(folder)
    findings = tuple(finding for rule in RULES[kind] for finding in _apply(rule, folder, kind))
    servers: dict[str, ServerAnswer] = {
        server: _verdict(server, folder, kind, findings) for server in SERVERS
    }
    return CheckReport(
        path=str(path),
        format=kind,
        types=_types(folder, kind),
        has_checksums=(folder.path / CHECKSUMS).is_file(),
        findings=findings,
        servers=servers,
        unknown={
            server: class_answer(find_server(server), folder.config or {}).reason
            for server, answer in servers.items()
            if answer == "not known"
        },
    )


def _kind(folder: CheckedFolder) -> FolderKind:
    if any(folder.path.glob("quant_model_description*.json")) or any(
        folder.path.glob("quant_model_weight*")
    ):
        return "ascend"
    if folder.quantization_config is None:
        return "float"
    method = weight_only.method_of(folder)
    return "gptq" if method == "gptq" else "awq" if method == "awq" else "compressed-tensors"


def _reads(server: str, kind: FolderKind) -> bool:
    return kind == "float" or kind in READS[find_server(server)]


def _apply(rule: Rule, folder: CheckedFolder, kind: FolderKind) -> list[Finding]:
    found = []
    for hit in rule.find(folder):
        breaks = rule.breaks if hit.breaks is None else hit.breaks
        kept = tuple(server for server in breaks if _reads(server, kind))
        if breaks and not kept:  # it is of servers that read other formats
            continue
        found.append(
            Finding(
                rule=rule.name,
                tensor=hit.tensor,
                message=hit.message,
                breaks=kept,
                source=rule.source,
            )
        )
    return found


def _types(folder: CheckedFolder, kind: FolderKind) -> dict[str, int]:
    """How many weights there are of each type."""
    counts: dict[str, int] = {}
    if kind == "ascend":
        types = tensor_types(folder).items()
        listed = [what for name, what in types if name.endswith(".weight")]
    elif kind == "compressed-tensors":
        listed = [group.name for _, group, _ in quantized(folder)]
    elif kind in weight_only.METHODS:
        listed = [f"W{found.bits}A16" for _, found, _ in weight_only.quantized(folder)]
    else:
        listed = []
    for what in listed:
        counts[what] = counts.get(what, 0) + 1
    return dict(sorted(counts.items()))


def _verdict(
    server: Server, folder: CheckedFolder, kind: FolderKind, findings: tuple[Finding, ...]
) -> ServerAnswer:
    if not _reads(server, kind):
        return "does not read this format"
    if any(server in finding.breaks for finding in findings):
        return "refuses"
    return "takes" if class_answer(server, folder.config or {}).has else "not known"
