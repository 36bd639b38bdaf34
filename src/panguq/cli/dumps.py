"""`panguq show`, `run`, `bisect` and `report`: look into the dump of a compile."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from panguq.cli.command import (
    Commands,
    add_command,
    add_json,
    finite,
    print_json,
    quiet_transformers,
)
from panguq.errors import InputError
from panguq.suggest import did_you_mean


def add(commands: Commands) -> None:
    """Add the commands to the command line."""
    show = add_command(
        commands,
        "show",
        run_show,
        "Show a dump: its summary, or one stage's graph, diff or tables. A stage is given as its "
        "number, its pass or its folder: 3, smoothquant, 03_smoothquant.",
        "panguq show dump 3 --diff",
    )
    _add_dump(show)
    show.add_argument("stage", metavar="STAGE", nargs="?", help="a stage; none: the summary")
    what = show.add_mutually_exclusive_group()
    what.add_argument("--diff", action="store_true", help="what the pass changed (the default)")
    what.add_argument("--graph", action="store_true", help="the graph after the pass")
    what.add_argument("--table", metavar="NAME", help="one of the pass's tables")
    add_json(show)
    rerun = add_command(
        commands,
        "run",
        replay_stage,
        "Run the graph that a dump holds on the dump's probe input. It is compared with the "
        "float graph.",
        "panguq run dump --limit 5",
    )
    _add_dump(rerun)
    rerun.add_argument("--limit", metavar="STAGE", help="the last pass to count (default: all)")
    add_json(rerun)
    search = add_command(
        commands,
        "bisect",
        run_bisect,
        "Find the first pass, and the rewrite inside it, that spoiled the result. Each matmul is "
        "fed the float model's input and compared with the float matmul.",
        "panguq bisect dump --floor 20",
    )
    _add_dump(search)
    search.add_argument(
        "--floor",
        metavar="DB",
        type=finite,
        help="the local SQNR that a matmul must keep; without it, the largest drop is looked for",
    )
    add_json(search)
    page = add_command(
        commands,
        "report",
        run_report,
        "Draw a dump as a page, one file to open in a browser. It shows passes and their diffs, "
        "each matmul's local SQNR, ranges of activations, and kernels.",
        "panguq report dump --out report.html",
    )
    _add_dump(page)
    page.add_argument("--out", metavar="FILE", type=Path, required=True, help="the page")


def _add_dump(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", metavar="DUMP", type=Path, help="the folder of a dump")
    parser.add_argument(
        "--model", metavar="DIR", type=Path, help="where the model lies now, if it was moved"
    )


def _reader(options: argparse.Namespace) -> Any:
    from panguq.dumps.reader import DumpReader

    quiet_transformers()
    return DumpReader(options.dump, options.model)


def run_show(options: argparse.Namespace) -> int:
    """Show the summary or a part of a stage."""
    reader = _reader(options)
    if options.stage is None:
        _print(options, {"summary": reader.summary(), "stages": list(reader.stages)}, "summary")
        return 0
    stage = reader.find(options.stage)
    if options.graph:
        _print(options, {"stage": stage, "graph": reader.text(stage)}, "graph")
    elif options.table is not None:
        tables = reader.tables(stage)
        if options.table not in tables:
            raise InputError(
                f"stage {stage} has no table {options.table!r}",
                did_you_mean(options.table, tables, "tables"),
            )
        _print(options, {"stage": stage, "table": tables[options.table]}, "table")
    else:
        found = {"stage": stage, "diff": reader.diff(stage), "tables": list(reader.tables(stage))}
        if not found["diff"]:
            found["diff"] = f"{stage} changed nothing that the graph shows\n"
        _print(options, found, "diff")
    return 0


def replay_stage(options: argparse.Namespace) -> int:
    """Run a stage's graph on the probe."""
    from panguq.dumps.replay import run_stage

    return _print_result(options, run_stage(_reader(options), options.limit))


def run_bisect(options: argparse.Namespace) -> int:
    """Find the culprit."""
    from panguq.dumps.bisect import bisect

    return _print_result(options, bisect(_reader(options), options.floor))


def run_report(options: argparse.Namespace) -> int:
    """Draw the page."""
    from panguq.pages.dump_page import write_dump_page

    write_dump_page(_reader(options), options.out)
    print(options.out)
    return 0


def _print(options: argparse.Namespace, found: dict[str, Any], shown: str) -> None:
    if options.json:
        print_json(found)
    else:
        print(found[shown], end="" if found[shown].endswith("\n") else "\n")


def _print_result(options: argparse.Namespace, result: Any) -> int:
    if options.json:
        print_json(result.model_dump())
    else:
        print(result.render())
    return 0
