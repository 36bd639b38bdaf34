"""Compile a model larger than the memory it may use: openPangu-Embedded-7B with random weights.

    python -m bench.large_model --layers 4 8 --recipes w8a8-dynamic w4a16

Each run is `panguq compile` in a process of its own, with 4 windows of 128 tokens, in a cgroup that
limits its memory, mapped files included. Where no cgroup can be made, RLIMIT_DATA limits it; that
counts the maps of the checkpoint too, so it is raised by the checkpoint's size. RssAnon, sampled,
is the memory that no file stands behind. Disk is what the process adds at its peak: files in the
output's folder and unlinked files that it maps.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.openpangu_folders import CONFIG, SIZES_1B, SIZES_7B, TEXT, write_json, write_tokenizer

GIB = 2**30
SIZES = {"7B": SIZES_7B, "1B": SIZES_1B}
SAMPLE_SECONDS = 0.05
DISK_SECONDS = 1.0  # a compile keeps hundreds of parts, and looking at each takes time
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Measured:
    """What one compile took; CPU seconds are those of all its threads."""

    seconds: float
    cpu_seconds: float
    anonymous_gib: float
    disk_gib: float
    exit_code: int


Part = Callable[[torch.Generator], dict[str, Tensor]]
"""Makes the weights of one file."""


def make_model(path: Path, size: str, layers: int) -> Path:
    """A checkpoint folder as published, one shard a layer, with random bfloat16 weights."""
    config = CONFIG | SIZES[size] | {"num_hidden_layers": layers}
    parts: list[Part] = [lambda generator: _ends(config, generator)]
    parts += [partial(_layer, config, index) for index in range(layers)]
    return write_folder(path, config, parts)


def write_folder(path: Path, config: dict[str, object], parts: Sequence[Part]) -> Path:
    """A folder with this config.json, a tokenizer and a shard a part; one that is whole is kept."""
    if (path / "model.safetensors.index.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path)
    write_json(path / "config.json", config)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, start=1):
        weights = part(generator)
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(weights, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, file)
        total += sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(path / "model.safetensors.index.json", index)
    return path


def normal(generator: torch.Generator, *shape: int, scale: float) -> Tensor:
    """Random bfloat16 weights of this standard deviation."""
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, scale, generator=generator)


def _ends(config: dict[str, object], generator: torch.Generator) -> dict[str, Tensor]:
    vocab, hidden = int(str(config["vocab_size"])), int(str(config["hidden_size"]))
    names = ["model.embed_tokens"] + ([] if config["tie_word_embeddings"] else ["lm_head"])
    weights = {
        f"{name}.weight": normal(generator, vocab, hidden, scale=hidden**-0.5) for name in names
    }
    weights["model.norm.weight"] = 1 + normal(generator, hidden, scale=0.3)
    return weights


def _layer(config: dict[str, object], index: int, generator: torch.Generator) -> dict[str, Tensor]:
    hidden, ffn = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    head = hidden // int(str(config["num_attention_heads"]))
    shared = head * int(str(config["num_key_value_heads"]))
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (shared, hidden),
        "self_attn.v_proj": (shared, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    layer = f"model.layers.{index}"
    weights: dict[str, Tensor] = {}
    for name, (n, k) in shapes.items():
        weights[f"{layer}.{name}.weight"] = normal(generator, n, k, scale=k**-0.5)
        if name.startswith("self_attn"):
            weights[f"{layer}.{name}.bias"] = normal(generator, n, scale=0.3)
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{layer}.{name}.weight"] = 1 + normal(generator, hidden, scale=0.3)
    return weights


def memory_group(limit_bytes: int) -> Path | None:
    """A new cgroup (version 2 or 1) with this limit; None where none can be made."""
    for root, key in ((CGROUPS, "memory.max"), (CGROUPS / "memory", "memory.limit_in_bytes")):
        group = root / f"panguq-bench-{os.getpid()}"
        if not (root / "cgroup.procs").exists():
            continue  # an ordinary folder, such as the one that holds the hierarchies of version 1
        try:
            group.mkdir()
            (group / key).write_text(str(limit_bytes), encoding="ascii")
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        return group
    return None


def compile_limited(
    model: Path,
    recipe: str,
    out: Path,
    limit_gib: float,
    threads: int,
    options: list[str],
    kill_when: Callable[[], bool] = lambda: False,
) -> Measured:
    """Run `panguq compile` under the limit and watch it; SIGKILL once `kill_when` says so."""
    text = model / "calibration.txt"
    text.write_text(TEXT * 40, encoding="utf-8")
    _drop_from_cache(model)
    limit = int(limit_gib * GIB)
    group = memory_group(limit)
    data = limit + int(folder_gib(model) * GIB)

    def confine() -> None:
        if group is None:
            resource.setrlimit(resource.RLIMIT_DATA, (data, data))
        else:
            (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    started, cpu_before = time.monotonic(), _children_cpu_seconds()
    process = subprocess.Popen(
        [*panguq_compile(model, recipe), "--out", str(out), "--force", *options],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "TMPDIR": str(out.parent)},
        preexec_fn=confine,
    )
    anonymous = disk = 0.0
    before = folder_gib(out.parent)
    looked = 0.0
    while process.poll() is None:
        anonymous = max(anonymous, _anonymous_gib(process.pid))
        if time.monotonic() - looked > DISK_SECONDS:
            disk = max(disk, _disk_gib(process.pid, out.parent) - before)
            if kill_when():
                process.kill()
            looked = time.monotonic()
        time.sleep(SAMPLE_SECONDS)
    seconds = time.monotonic() - started
    if group is not None:
        group.rmdir()
    cpu = _children_cpu_seconds() - cpu_before
    return Measured(seconds, cpu, anonymous, disk, process.returncode)


def panguq_compile(model: Path, recipe: str) -> list[str]:
    """The command, but for where its result goes."""
    command = [sys.executable, "-m", "panguq.cli", "compile", str(model), "--recipe", recipe]
    text = str(model / "calibration.txt")
    return [*command, "--calibration", text, "--windows", "4", "--window", "128"]


def _drop_from_cache(folder: Path) -> None:
    """Let the compile read the files: pages that are there already count for who read them."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _anonymous_gib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) / 2**20 if found else 0.0


def _disk_gib(pid: int, folder: Path) -> float:
    """Files under the folder, and files that the process maps under a name that is gone: those
    without any name left, and those whose second name is in the folder, which count once."""
    return sum({**_unlinked(pid), **_files(folder)}.values()) / GIB


def folder_gib(folder: Path) -> float:
    """Bytes of the files under a folder, each file once however many names it has."""
    return sum(_files(folder).values()) / GIB


def _unlinked(pid: int) -> dict[int, int]:
    """Bytes by inode."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    except OSError:
        return {}
    sizes = {}
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith("(deleted)") and fields[3] != "00:01":
            start, end = (int(part, 16) for part in fields[0].split("-"))
            sizes[int(fields[4])] = end - start
    return sizes


def _files(folder: Path) -> dict[int, int]:
    """Bytes by inode."""
    sizes = {}
    for place, _, names in os.walk(folder):  # which goes on where a folder has vanished
        for name in names:
            try:
                found = os.lstat(Path(place, name))
            except OSError:
                continue
            sizes[found.st_ino] = found.st_size
    return sizes


def main() -> None:
    """Run the compiles and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="7B")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--recipes", nargs="+", default=["w8a8-dynamic", "w4a16"])
    parser.add_argument("--folder", type=Path, default=Path("build/large"))
    parser.add_argument("--limit-gib", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep models and results")
    options, rest = parser.parse_known_args()
    print("model recipe layers seconds cpu_s peak_anonymous_gib input_gib output_gib disk_gib exit")
    for layers in options.layers:
        model = make_model(options.folder / f"{options.size}-{layers}", options.size, layers)
        for recipe in options.recipes:
            work = options.folder / "out"
            work.mkdir(exist_ok=True)
            out = work / f"{options.size}-{layers}-{Path(recipe).stem}"
            found = compile_limited(model, recipe, out, options.limit_gib, options.threads, rest)
            sizes = f"{folder_gib(model):.2f} {folder_gib(out):.2f} {found.disk_gib:.2f}"
            print(
                f"{options.size} {recipe} {layers} {found.seconds:.0f} {found.cpu_seconds:.0f} "
                f"{found.anonymous_gib:.2f} {sizes} {found.exit_code}",
                flush=True,
            )
            if not options.keep:
                shutil.rmtree(work, ignore_errors=True)
        if not options.keep:
            shutil.rmtree(model)


if __name__ == "__main__":
    main()
