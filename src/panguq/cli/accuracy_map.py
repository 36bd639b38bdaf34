"""`panguq map`: recipes by tasks of one model, in a folder that grows cell by cell."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from panguq.cli.command import (
    Commands,
    add_command,
    add_json,
    counted,
    finite,
    print_json,
    quiet_transformers,
    tokens,
    whole,
)
from panguq.errors import InputError

THINKING = ("slow", "auto", "none")


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "map",
        run,
        "Measure recipes on tasks and draw the map: accuracy against float with intervals, what "
        "collapses and where, and what it costs. Killed anywhere, the same command goes on.",
        "panguq map smollm2 --recipes w8a8-dynamic w4a16-gptq --tasks wikipedia arc_easy "
        "humaneval --data DATA_DIR --out map",
    )
    command.add_argument("model", metavar="MODEL_DIR", type=Path, nargs="?", help="a model folder")
    command.add_argument("--recipes", nargs="+", default=[], help="names or YAML files")
    command.add_argument("--tasks", nargs="+", default=[], help="docs/map.md lists them")
    command.add_argument("--data", metavar="DIR", type=Path, help="the sets that the tasks read")
    command.add_argument("--out", metavar="DIR", type=Path, default=Path("map"), help="the map")
    command.add_argument("--report", metavar="DIR", type=Path, help="draw a map's page again")
    command.add_argument(
        "--compare", metavar="DIR", type=Path, nargs=2, help="say what differs between two maps"
    )
    command.add_argument("--require", metavar="RULE", action="append", default=[],
                         help="'humaneval >= 90%%' of float's: exit status 1 where a recipe has "
                         "less; may be repeated")  # fmt: skip
    command.add_argument("--target", default="cpu", help="what to compile for (default: cpu)")
    command.add_argument("--calibration", metavar="FILE", type=Path, help="as of panguq compile")
    command.add_argument("--windows", type=counted, default=16, help="pieces to calibrate on")
    command.add_argument("--window", type=tokens, default=512, help="tokens in each of them")
    command.add_argument("--sampled", type=whole(0, 2**14), default=0, help="as of panguq compile")
    add_answers(command)
    command.add_argument("--retry", action="store_true", help="make cells that failed anew, too")
    command.add_argument("--keep", action="store_true", help="keep the compiled models")
    command.add_argument("--on", choices=("local", "ray"), default="local", help="what computes")
    command.add_argument("--processes", type=whole(1, 1024), help="of --on local (default: as many "
                         "as memory allows by the plan's forecast)")  # fmt: skip
    command.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster (default: a Ray "
                         "started here)")  # fmt: skip
    add_json(command)


def add_answers(command: argparse.ArgumentParser) -> None:
    """The options of how tasks are answered, which `panguq eval` has too."""
    command.add_argument("--limit", metavar="N", type=counted, help="a seeded sample of N items "
                         "a task (default: all)")  # fmt: skip
    command.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of the samples")
    command.add_argument("--thinking", nargs="+", choices=THINKING, default=[],
                         help="ask for code in a chat, in each of these modes")  # fmt: skip
    command.add_argument("--max-new-tokens", type=tokens, help="the budget of an answer "
                         "(default: the task's own)")  # fmt: skip
    command.add_argument("--samples", type=whole(1, 1000), default=1, help="answers to a problem, "
                         "for pass@k")  # fmt: skip
    command.add_argument("--temperature", type=finite, default=0.0, help="above 0: sampled answers")
    command.add_argument("--batch", type=whole(1, 4096), default=8, help="prompts at once")
    command.add_argument("--unsafe-no-sandbox", dest="unsafe", action="store_true",
                         help="run the model's code as yourself, on this machine")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Fill the map, or draw it, or compare two."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars hide ours; read when tqdm is imported
    if options.compare:
        return _compare(options)
    if options.report:
        return _report(options)
    if options.model is None or not options.recipes or not options.tasks:
        raise InputError(
            "a model, --recipes and --tasks make a map",
            "panguq map MODEL_DIR --recipes w8a8-dynamic --tasks wikipedia --data DIR --out map",
        )
    quiet_transformers()
    from panguq.accuracy_map.ask import Asked, jobs_of
    from panguq.accuracy_map.folder import MapFolder
    from panguq.accuracy_map.requirement import parse_requirement, shortfalls

    wanted = [parse_requirement(text, options.tasks) for text in options.require]
    command = shlex.join(["panguq", *sys.argv[1:]])
    jobs = jobs_of(
        Asked(
            options.model, options.recipes, options.tasks, options.data, options.target,
            options.calibration, options.windows, options.window, options.sampled, options.limit,
            options.seed, options.thinking, options.max_new_tokens, options.temperature,
            options.samples, options.batch, options.unsafe,
        ),
        command,
    )  # fmt: skip
    folder = MapFolder.of_model(options.out, str(options.model), jobs[0].model_sha256)
    if options.retry:
        folder.drop_failed(jobs)
    _fill(folder, jobs, options)
    folder.list_cells()
    _draw(folder)
    if options.json:
        print_json(_listed(folder))
    else:
        print(_summary(folder, jobs))
    fallen = [line for rule in wanted for line in shortfalls(folder, jobs, rule)]
    for line in fallen:
        print(line, file=sys.stderr)
    return 1 if fallen else 0


def _fill(folder: Any, jobs: Any, options: argparse.Namespace) -> None:
    from panguq.accuracy_map.worker import drop_if_last

    told = _teller(sum(not folder.has(job) for job in jobs))
    try:
        if options.on == "ray":
            from panguq.accuracy_map.on_ray import run_on_ray

            run_on_ray(folder, jobs, keep=options.keep, address=options.ray_address, told=told)
        else:
            from panguq.accuracy_map.local import run_local

            run_local(folder, jobs, keep=options.keep, processes=options.processes, told=told)
        for job in [] if options.keep else jobs:
            drop_if_last(folder, job, jobs)
    except KeyboardInterrupt as error:
        error.add_note(f"finished cells are in {folder.path}, the same command goes on")
        raise


def _teller(total: int) -> Any:
    """Says each finished cell on stderr, with the time left as it looks so far."""
    from panguq.report.progress import duration

    started, done = time.monotonic(), 0

    def told(cell: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        left = (time.monotonic() - started) / done * max(total - done, 0)
        value = "-" if cell.get("value") is None else f"{cell['value']:.4g}"
        mode = f"/{cell['thinking']}" if cell.get("thinking") else ""
        print(
            f"{done}/{total} {cell['recipe']} {cell['task']}{mode}: {value} {cell['status']}"
            + (f", about {duration(left)} left" if done < total else ""),
            file=sys.stderr,
            flush=True,
        )

    return told


def _report(options: argparse.Namespace) -> int:
    from panguq.accuracy_map.folder import MapFolder

    folder = MapFolder.existing(options.report)
    folder.list_cells()
    _draw(folder)
    if options.json:
        print_json(_listed(folder))
    else:
        print(f"{folder.path / 'index.html'}: {len(folder.cells())} cells")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from panguq.accuracy_map.compare import compare_maps, compare_text
    from panguq.accuracy_map.folder import MapFolder

    rows = compare_maps(*(MapFolder.existing(path) for path in options.compare))
    if options.json:
        print_json(rows)
    else:
        print(compare_text(rows))
    return 0


def _draw(folder: Any) -> None:
    from panguq.pages.map_page import write_map_page

    write_map_page(folder)


def _listed(folder: Any) -> list[dict[str, Any]]:
    from panguq.accuracy_map.folder import listed

    return [listed(cell) for cell in folder.cells()]


def _summary(folder: Any, jobs: Any) -> str:
    from collections import Counter

    from panguq.accuracy_map.forecast import seconds_for_all
    from panguq.report.progress import duration

    cells = [folder.cell(job) for job in jobs]
    counts = Counter(cell["status"] for cell in cells)
    lines = [f"{len(cells)} cells: " + ", ".join(f"{n} {status}" for status, n in counts.items())]
    lines += [
        f"  {cell['recipe']} {cell['task']}: {cell['status']}, {cell['reason']}"
        for cell in cells
        if cell["status"] not in ("ok", "chance")
    ]
    whole_seconds = seconds_for_all(cells)
    if whole_seconds is not None:
        lines.append(f"all items, without --limit, would take about {duration(whole_seconds)}")
    lines.append(f"the page: {folder.path / 'index.html'}")
    return "\n".join(lines)
