"""One changed byte somewhere in a folder that panguq wrote, or that it reads.

A saved model is refused. A folder for a server is reported by `panguq check`. A work folder gives
the same bits all the same. A dump shows and runs as before, or is refused. A source model has no
checksums: it is refused, or loads.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

import panguq
from fuzz.kind import Case, Fault, Kind
from panguq.check.files import open_folder
from panguq.check.unchanged import UNCHANGED_RULES
from panguq.cli import parser
from panguq.compiled_model import load
from panguq.errors import StorageError
from panguq.models.hf import load_pretrained, load_tokenizer
from tests.model_folders import make_folder, make_model

_WEIGHTS = {
    "saved": 3, "module": 1, "compressed-tensors": 3, "ascend": 3, "dump": 3, "source": 2,
    "work": 1,
}  # fmt: skip


def _prepare(folder: Path) -> Case:
    torch.set_num_threads(1)
    source = make_folder(folder / "source", make_model(num_hidden_layers=1, hidden_size=64))
    ids = torch.randint(3, 258, (2, 16), generator=torch.Generator().manual_seed(5))
    model = load_pretrained(source)
    compiled = panguq.compile(
        model, "w8a8", calibration=ids, dump_dir=folder / "dump", work_dir=folder / "work"
    )
    compiled.save(folder / "saved")
    wanted = compiled(ids).logits
    panguq.compile(model, "w8a8-dynamic").save(
        folder / "compressed-tensors", format="compressed-tensors"
    )
    panguq.compile(model, "w8a8", calibration=ids, target="ascend910b1").save(
        folder / "ascend", format="ascend"
    )
    linear = torch.nn.Sequential(torch.nn.Linear(64, 64))
    panguq.compile(linear, "w8a16", example_inputs=(torch.randn(4, 64),)).save(folder / "module")

    def same_bits(place: Path, changed: str) -> str:
        resumed = panguq.compile(model, "w8a8", calibration=ids, work_dir=place)
        if not torch.equal(resumed(ids).logits, wanted):
            raise Fault(f"{changed}: other bits without a word")
        return "the same bits"

    shown = _shown(folder / "dump")

    def same_text(place: Path, changed: str) -> str:
        if _shown(place) != shown:
            raise Fault(f"{changed}: the dump shows or computes something else")
        return "harmless"

    readers: dict[str, Callable[[Path, str], str]] = {
        "saved": _is_refused, "module": _is_refused, "compressed-tensors": _is_found,
        "ascend": _is_found, "dump": same_text, "source": _loads, "work": same_bits,
    }  # fmt: skip

    def case(rng: random.Random) -> str:
        kind = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        copy = folder / "case" / kind  # a dump names itself nowhere; the name is the same each time
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / kind, copy)
        return readers[kind](copy, _flip(copy, rng))

    return case


def _flip(folder: Path, rng: random.Random) -> str:
    """Change a byte; returns where. A header of safetensors is met as often as its tensors."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    file = rng.choice(files) if rng.random() < 0.7 else max(files, key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else len(data)
    place = rng.randrange(min(header, len(data)) if rng.random() < 0.5 else len(data))
    data[place] ^= 1 << rng.randrange(8) if rng.random() < 0.7 else rng.randrange(1, 256)
    file.write_bytes(data)
    return f"byte {place} of {file.relative_to(folder)}"


def _is_refused(place: Path, changed: str) -> str:
    try:
        load(place)
    except StorageError:
        return "refused"
    raise Fault(f"{changed}: the changed model loads")


def _is_found(place: Path, changed: str) -> str:
    (rule,) = UNCHANGED_RULES
    if not list(rule.find(open_folder(place))):
        raise Fault(f"{changed}: panguq check finds nothing")
    return "found"


def _loads(place: Path, changed: str) -> str:
    load_pretrained(place), load_tokenizer(place)
    return "loads"


def _shown(dump: Path) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for arguments in (["show"], ["show", "--graph"], ["run", "--json"]):
            given = parser().parse_args([arguments[0], str(dump), *arguments[1:]])
            given.run(given)
    return said.getvalue().replace(str(dump), "DUMP")


KIND = Kind("flips", "one changed byte in a folder", _prepare, seconds=120)
