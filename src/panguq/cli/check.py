"""`panguq check`: will a server take this folder?"""

from __future__ import annotations

import argparse
from pathlib import Path

from panguq.cli.command import Commands, add_command, add_json, print_json, quiet_transformers


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "check",
        run,
        "Check a quantized checkpoint against what servers' loaders want. AscendV1 folders "
        "(msModelSlim's format), compressed-tensors, GPTQ and AWQ folders, whoever wrote them. "
        "Exit status 1 if a server that reads the format would refuse it, or if the one asked for "
        "would, or it is not known whether it has a class for the model.",
        "panguq check smollm2-w8a8-ascend --server vllm-ascend==0.23",
    )
    command.add_argument("folder", metavar="DIR", type=Path, help="the checkpoint's folder")
    command.add_argument(
        "--server",
        metavar="NAME[==VERSION]",
        help="ask for this server alone: vllm-ascend, vllm-ascend==0.23, mindie, sglang, vllm or "
        "transformers",
    )
    add_json(command)


def run(options: argparse.Namespace) -> int:
    """Check and print."""
    from panguq.check.report import check_folder

    quiet_transformers()
    report = check_folder(options.folder, options.server)
    if options.json:
        print_json(report.model_dump())
    else:
        print(report.render(options.server))
    return 1 if report.refused_by(options.server) else 0
