"""Compare panguq with other quantizers on the same model, tokens and evaluation.

    python -m bench.peers [--models smollm2 random] [--methods gptq awq ...] [--peers panguq ...]
        [--work DIR] [--environments DIR] [--json FILE] [--write docs/accuracy.md]

Every peer gets a virtual environment (`.venv-gptqmodel` and so on, together some 5 GB) and every
row a process. A run that was interrupted continues with the rows that are not there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from bench.peers.environments import PANGUQ, make_environment
from bench.peers.inputs import model_folder, tokens_file
from bench.peers.job import FIGURES, WEIGHTS, Job
from bench.peers.rows import GROUP_SIZES, METHODS, PeerRow, rows
from bench.peers.table import tables
from bench.results import Results, Row, write_between_markers
from conformance.environment import ROOT, TORCH, Unavailable
from panguq.evaluation import logits_of


def main() -> None:
    """Make the rows that are not there yet, print the tables, write them if asked to."""
    options = parse(sys.argv[1:])
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.json or options.work / "peers.json", {"windows": options.windows})
    chosen = list(rows(options.models, options.methods, options.peers))
    for number, row in enumerate(chosen, start=1):
        if not results.finished(row.name):
            print(f"{number}/{len(chosen)} {row.name}", file=sys.stderr, flush=True)
            results.put(row.name, measure(row, options))
    text = tables(results.rows)
    print(text)
    if options.write:
        write_between_markers(options.write, "peers", text)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers")
    parser.add_argument("--models", nargs="*", default=[], choices=list(GROUP_SIZES))
    parser.add_argument("--methods", nargs="*", default=[], choices=list(METHODS))
    parser.add_argument("--peers", nargs="*", default=[], help="names, as in the table")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "peers")
    parser.add_argument("--environments", type=Path, default=ROOT, help="where .venv-* lie")
    parser.add_argument("--torch", default=os.environ.get("TORCH", TORCH), help="as pip wants it")
    parser.add_argument("--json", type=Path, help="default: peers.json in the work folder")
    parser.add_argument("--write", type=Path, help="a page with markers for the tables")
    return parser.parse_args(arguments)


def measure(row: PeerRow, options: argparse.Namespace) -> Row:
    """Quantize in the peer's process, then evaluate here; or `{"error": …}`."""
    try:
        python = make_environment(row.peer, options.environments, options.torch)
    except Unavailable as reason:
        return {"error": str(reason)[-500:]}
    work: Path = options.work.absolute()
    folder = model_folder(row.model, work).absolute()
    job = Job(
        model=str(folder),
        tokens=str(tokens_file(row.model, folder, work, options.windows)),
        method=row.method,
        group_size=GROUP_SIZES[row.model],
        threads=options.threads,
        out=str(work / row.name),
    )
    out = Path(job.out)
    if not (out / FIGURES).exists():
        error = run_job(row, job, python)
        if error is not None:
            return {"error": error}
    found: Row = json.loads((out / FIGURES).read_text(encoding="utf-8"))
    if row.peer is not PANGUQ:
        found |= evaluate_peer(job)
        (out / WEIGHTS).unlink(missing_ok=True)  # half a gigabyte that nothing reads any more
    (out / FIGURES).unlink()  # the row keeps them, and another run shall measure again
    return found


def run_job(row: PeerRow, job: Job, python: Path) -> str | None:
    """Run the peer's script; what it printed goes to a log. Returns its last line on failure."""
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    file, log = out / "job.json", out / "log.txt"
    file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    variables = {
        **os.environ,
        **dict(row.peer.variables),
        "OMP_NUM_THREADS": str(job.threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [str(python), "-m", f"bench.peers.{row.peer.script}", str(file)]
    with log.open("w", encoding="utf-8") as said:
        # Some of them write files into the folder that they are started from.
        done = subprocess.run(command, cwd=out, env=variables, stdout=said, stderr=said)
    if done.returncode == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{(lines or [''])[-1][:300]} (exit code {done.returncode})"


def evaluate_peer(job: Job) -> Row:
    """The quality of what the peer wrote, by panguq's evaluation."""
    import torch

    from bench.peers.quality import float_model, peer_model, quality

    torch.set_num_threads(job.threads)
    model = peer_model(Path(job.out), job.model, job.method)
    return dict(quality(logits_of(model), float_model(job.model), job.tokens))


if __name__ == "__main__":
    main()
