"""`panguq export-onnx`: a stage of a compiled model, or of a dump, as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from panguq.cli.command import Commands, add_command, add_json, print_json, quiet_transformers
from panguq.errors import InputError


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "export-onnx",
        run,
        "Write a stage of a compiled model as an ONNX file, to look at in Netron and to run in "
        "onnxruntime. A compiled model has the stages fake-quant and lowered; a dump has one for "
        "every pass.",
        "panguq export-onnx smollm2-w8a8 --stage fake-quant --out fake-quant.onnx",
    )
    command.add_argument("source", metavar="DIR", type=Path, help="a compiled model, or a dump")
    command.add_argument(
        "--stage",
        metavar="STAGE",
        help="fake-quant, lowered, or a dump's stage: 3, smoothquant, 03_smoothquant (default: "
        "lowered; of a dump the last)",
    )
    command.add_argument("--out", required=True, metavar="FILE", type=Path, help="where to write")
    command.add_argument(
        "--for",
        dest="runtime",
        choices=("onnxruntime-genai",),
        help="write a folder that this generates text from: the lowered graph with the inputs that "
        "it feeds, its configuration and the tokenizer",
    )
    command.add_argument(
        "--functions",
        action="store_true",
        help="show each quantized linear, rotary embedding, … and each layer as one box that opens "
        "on a click (ONNX local functions)",
    )
    command.add_argument("--force", action="store_true", help="replace the file")
    command.add_argument(
        "--model", metavar="MODEL_DIR", type=Path, help="where a dump's model lies now, if moved"
    )
    add_json(command)


def run(options: argparse.Namespace) -> int:
    """Export and say what was written."""
    quiet_transformers()
    from panguq.dumps.files import DUMP_JSON

    if options.runtime is not None:
        return _export_for_genai(options)
    if (options.source / DUMP_JSON).exists():
        stage = _export_dump(options)
    else:
        stage = _export_model(options)
    data = options.out.with_name(f"{options.out.name}.data")
    files = [path for path in (options.out, data) if path.exists()]
    if options.json:
        sizes = {str(path): path.stat().st_size for path in files}
        print_json({"stage": stage, "files": sizes})
    else:
        print(f"stage {stage} of {options.source}")
        for path in files:
            print(f"  {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    return 0


def _export_for_genai(options: argparse.Namespace) -> int:
    from panguq.extras import require

    require("onnx", "ONNX export")
    from panguq.dumps.files import DUMP_JSON
    from panguq.formats.onnx.genai import export_genai
    from panguq.formats.own.model_folder import read_model

    if options.stage is not None or (options.source / DUMP_JSON).exists():
        raise InputError(
            f"--for {options.runtime} writes the lowered stage of a compiled model alone",
            "leave out --for, or name a compiled model and no --stage",
        )
    export_genai(read_model(options.source), options.out, options.force)
    sizes = {str(file): file.stat().st_size for file in sorted(options.out.iterdir())}
    if options.json:
        print_json({"stage": "lowered", "files": sizes})
    else:
        print(f"{options.source} for {options.runtime}")
        for name, size in sizes.items():
            print(f"  {name} ({size / 2**20:.1f} MiB)")
    return 0


def _export_dump(options: argparse.Namespace) -> str:
    from panguq.dumps.reader import DumpReader
    from panguq.formats.onnx.export import export_dump

    reader = DumpReader(options.source, options.model)
    return export_dump(reader, options.out, options.stage, options.force, options.functions)


def _export_model(options: argparse.Namespace) -> str:
    from panguq.artifact import LOWERED
    from panguq.formats.onnx.export import export_onnx
    from panguq.formats.own.model_folder import read_model

    if options.model is not None:
        raise InputError(
            f"{options.source} is no dump, and only dumps need --model", "leave out --model"
        )
    stage = options.stage or LOWERED
    export_onnx(read_model(options.source), options.out, stage, options.force, options.functions)
    return stage
