"""Files made to do harm, in a folder that loads: what they ask for is refused, or is nothing.

Whatever comes of it, no code runs, nothing is written outside, and no refusal takes long or much.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import panguq
from fuzz.kind import Case, Fault, Kind
from panguq.check.report import check_folder
from panguq.compiled_model import load
from panguq.errors import PanguqError
from panguq.files.manifest import MANIFEST, manifest_text
from panguq.models.hf import load_pretrained, load_tokenizer, skeleton
from tests.model_folders import make_folder, make_model

MOST_BYTES = 200 << 20
MOST_SECONDS = 6.0
"""Of processor time. A refusal takes tenths of one; what is not refused, and is built, more."""
_NUMBERS = (0, -1, 1, 2, 3, 7, 64, 1000, 10**5, 10**6, 10**9, 10**12, 2**31, 2**63, 10**300, 0.5,
            -4.0, 1e308)  # fmt: skip
_WORDS = (
    "",
    "os.system",
    "../evil",
    "/etc/passwd",
    "a" * 5000,
    "\ud800",
    "float99",
    "int8",
    "evil/kernel",
    "kernels-community/flash-attn2",
    "__import__('os').system('touch pwned')",
    "{{ ''.__class__.__mro__ }}",
    "hidden.safetensors",
    "llama",
    "gpt2",
    "mamba",
    "x\0y",
)
_OTHERS = (None, True, False, [], {}, [[]], {"a": None}, [1, "a"], {"rope_type": "evil"})
_KEYS = (
    "attn_implementation", "_attn_implementation", "auto_map", "transformers_weights",
    "_name_or_path", "trust_remote_code", "quantization_config", "use_kernels", "kernel_config",
    "dtype", "torch_dtype", "model_type", "architectures", "rope_parameters", "rope_scaling",
    "text_config",
    "layer_types", "sliding_window", "per_layer_config", "head_dim", "pad_token_id", "hidden_act",
    "cache_implementation", "custom_generate", "tie_word_embeddings", "is_decoder", "self", "cls",
)  # fmt: skip
_DROPPED = ("chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "vocab.json",
            "tokenizer.model", "tokenization_evil.py", "modeling_evil.py", "adapter_config.json",
            "generation_config.json", "tokenizer.4.0.0.json", "processor_config.json")  # fmt: skip
_SHAPES = ([], [-2], [2**62, 4], [2**40, 0], ["a"], [1.5])
_OFFSETS = ([0, 8], [8, 0], [0, 2**63], [-1, 1], [])
_NAMES = ("", "x" * 10_000, "../a", "a.weight")
_EVIL = "from pathlib import Path; Path(__file__).with_name('pwned').touch()"


def _value(rng: random.Random) -> Any:
    return rng.choice(rng.choice((_NUMBERS, _WORDS, _OTHERS)))


def _json(path: Path, rng: random.Random) -> None:
    """One to three entries of a JSON file are something else; or the text is no such JSON."""
    data = json.loads(path.read_text())
    places = [data, *(part for part in data.values() if isinstance(part, dict) and part)]
    for _ in range(rng.randrange(1, 4)):
        place = rng.choice(places)
        keys = [*place, *(_KEYS if place is data else ())]
        place[rng.choice(keys)] = _value(rng)
    text = json.dumps(data)
    if rng.random() < 0.15:
        text = rng.choice((
            "", "[]", "null", "[" * 100_000, text[: len(text) // 2], '{"a": NaN}', text + text,
            text.replace(":", ": 1" + "0" * 5000 + " +", 1), f'{{"a": 1, "a": 2, {text[1:]}',
        ))  # fmt: skip
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def _grown(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.choice((1 << 26, 1 << 29, 3 << 30, 1 << 36)))


def _replaced(path: Path, rng: random.Random) -> None:
    """Something else than a file of this folder."""
    away = path.with_name("away")
    path.rename(away)
    kind = rng.choice(("link", "loop", "pipe", "folder", "nothing", "device", "empty"))
    if kind == "link":
        path.symlink_to(rng.choice((away, Path("/etc/passwd"), Path("/dev/zero"))))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.touch()


def _weights(path: Path, rng: random.Random) -> None:
    """A header of safetensors that lies."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    for _ in range(rng.randrange(1, 3)):
        rng.choice((
            lambda: entry.update(dtype=rng.choice(("F99", "F8_E8M0", "C64", "BOOL", "F64", 7))),
            lambda: entry.update(shape=rng.choice(_SHAPES)),
            lambda: entry.update(data_offsets=rng.choice(_OFFSETS)),
            lambda: header.update({rng.choice(_NAMES): dict(entry)}),
            lambda: header.pop(name, None),
            lambda: header.update({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                                   for i in range(rng.choice((10, 20_000, 300_000)))}),
        ))()  # fmt: skip
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text += b" " * rng.choice((8, 90 << 20))
    length = rng.choice((len(text),) * 8 + (0, 2**63, 2**64 - 1, 90_000_000))
    path.write_bytes(length.to_bytes(8, "little") + text + data[8 + length :])


def _index(path: Path, rng: random.Random) -> None:
    """An index beside the single file, or in its place."""
    names = ("../evil.safetensors", "/etc/passwd", "..", "", "a\0b", "x" * 5000, "a.safetensors", 7)
    places = {f"t{number}": rng.choice(names) for number in range(rng.choice((0, 1, 3)))}
    text = json.dumps({"weight_map": rng.choice((places, places, [1], None))})
    path.with_name("model.safetensors.index.json").write_text(text)


def _dropped(path: Path, rng: random.Random) -> None:
    text = rng.choice((_EVIL, "{}", '{"quantized": 263}', "EVIL {{ messages }}", "[1]", ""))
    path.with_name(rng.choice(_DROPPED)).write_text(text)


def _prepare(folder: Path) -> Case:
    torch.set_num_threads(1)
    source = make_folder(folder / "source", make_model(num_hidden_layers=1, hidden_size=64))
    model = load_pretrained(source)
    compiled = panguq.compile(model, "w8a16")
    compiled.save(folder / "saved")
    panguq.compile(model, "w8a8-dynamic").save(folder / "served", format="compressed-tensors")
    ids = torch.arange(3, 12)[None]
    logits, tokens = compiled(ids).logits, compiled.tokenizer("A quantized model")["input_ids"]

    def read_saved(place: Path) -> str:
        found: Any = load(place)
        if found(ids).logits.shape != logits.shape:
            raise Fault("a saved model computes another shape")
        return "loads"

    def read_added(place: Path) -> str:
        found: Any = load(place)
        if not torch.equal(found(ids).logits, logits):
            raise Fault("other logits without a word")
        if found.tokenizer("A quantized model")["input_ids"] != tokens:
            raise Fault("other tokens without a word")
        return "loads"

    def read_source(place: Path) -> str:
        load_pretrained(place), load_tokenizer(place)
        return "loads"

    def case(rng: random.Random) -> str:
        kind = rng.choice(("source", "source", "saved", "added", "served"))
        place = folder / "case" / "model"
        shutil.rmtree(place.parent, ignore_errors=True)
        shutil.copytree(folder / ("saved" if kind == "added" else kind), place)
        _attack(kind, place, rng)
        readers: dict[str, Callable[[Path], object]] = {
            "source": rng.choice((read_source, skeleton, check_folder)),
            "saved": read_saved, "added": read_added, "served": check_folder,
        }  # fmt: skip
        return f"{kind} {_watched(readers[kind], place, folder)}"

    return case


def _attack(kind: str, place: Path, rng: random.Random) -> None:
    if kind == "added":
        for _ in range(rng.randrange(1, 4)):
            name = rng.choice(_DROPPED)
            if not (place / name).exists():
                (place / name).write_text(rng.choice((_EVIL, '{"quantized": 263}', "EVIL")))
        return
    texts = [path for path in sorted(place.glob("*.json")) if path.name != MANIFEST]
    weights = next(iter(sorted(place.glob("*.safetensors"))))
    edits: dict[Callable[[Path, random.Random], None], list[Path]] = {
        _json: texts, _grown: [*texts, weights], _replaced: [*texts, weights],
        _weights: [weights], _index: [weights], _dropped: [weights],
    }  # fmt: skip
    edit = rng.choices(list(edits), (8, 2, 2, 4, 1, 1))[0]
    edit(rng.choice(edits[edit]), rng)
    if kind == "saved" and rng.random() < 0.8:
        _sign_again(place)


def _sign_again(place: Path) -> None:
    """Let the manifest fit: nobody's accident."""
    manifest = json.loads((place / MANIFEST).read_text())
    for name in manifest["files"]:
        path = place / name
        if path.is_file() and path.stat().st_size < 1 << 27 and path.resolve().parent == place:
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            manifest["files"][name] = {"bytes": len(data), "sha256": digest}
    (place / MANIFEST).write_bytes(manifest_text(manifest))


def _watched(read: Callable[[Path], object], place: Path, folder: Path) -> str:
    """What came of reading, or Fault: for code that ran, memory and time."""
    before, began = _peak(), time.process_time()
    came = "read"
    try:
        with patch.object(socket.socket, "connect", side_effect=Fault("something is fetched")):
            read(place)
    except PanguqError as error:
        came = "refused"
        if len(str(error)) > 2000:
            raise Fault(f"a message of {len(str(error))} characters") from error
    if list(folder.rglob("pwned")):
        raise Fault("code of the folder ran")
    grown, seconds = _peak() - before, time.process_time() - began
    if came == "refused" and grown > MOST_BYTES:
        raise Fault(f"refused after {grown >> 20} MiB")
    if seconds > MOST_SECONDS:
        raise Fault(f"{came} after {seconds:.0f} s")
    return came


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


KIND = Kind("files", "files made to do harm in a folder that loads", _prepare, seconds=120)
