"""What a dump holds, where it may be written, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, fx, nn
from transformers import LlamaForCausalLM

import panguq
from panguq.compile_report import CompileReport
from panguq.dumps import dump as dump_module
from panguq.dumps import stage_writer
from panguq.dumps.bisect import bisect
from panguq.dumps.reader import DumpReader
from panguq.dumps.replay import probe_for, run_stage
from panguq.errors import NumericsError, RecipeError, StorageError
from panguq.files.checksums import CHECKSUMS
from panguq.ir.run import interpret
from panguq.ir.text.serialize import to_text
from panguq.ir.trace_causal_lm import trace_causal_lm
from panguq.passes import quantize_weights
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.passes.gptq import Gptq
from panguq.passes.pipeline.base import PassContext
from panguq.recipe import Recipe
from panguq.tensors.weight_store import WeightStore

STAGES = [
    "00_trace", "01_canonicalize", "02_assign-schemes", "03_smoothquant", "04_calibrate",
    "05_outliers", "06_outliers", "07_insert-fake-quant", "08_quantize-weights",
    "09_lower-matmuls",
]  # fmt: skip
Dumped = tuple[DumpReader, dict[str, fx.GraphModule]]


def stored_hashes(folder: Path) -> list[str]:
    found: list[str] = []
    for path in sorted(folder.glob("*/tensors.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found += file.keys()
    return found


# --- what it holds ------------------------------------------------------------------------------


def test_layout(w8a8: Dumped) -> None:
    reader, _ = w8a8
    assert reader.stages == STAGES
    names = {path.name for path in reader.path.iterdir()}
    assert names == {"summary.txt", "dump.json", "probe.safetensors", "SHA256SUMS", *STAGES}
    for stage in STAGES[1:]:
        files = {path.name for path in (reader.path / stage).iterdir()}
        assert {"graph.txt", "graph.json", "stage.json", "skipped.csv"} <= files
    assert "ranges" in reader.tables("04_calibrate")
    assert reader.tables("02_assign-schemes")["skipped"].startswith("node,reason\nlm_head:linear,")


def test_summary_has_one_line_a_pass(w8a8: Dumped) -> None:
    summary = w8a8[0].summary()
    lines = {line.split()[0]: line for line in summary.splitlines() if line[:1] == "0"}
    assert list(lines) == STAGES[1:]
    assert "exact: differs by" in lines["03_smoothquant"]
    assert "worst local SQNR" in lines["07_insert-fake-quant"]
    assert ":linear" in lines["07_insert-fake-quant"]
    assert "recipe w8a8, target cpu, seed 0" in summary


def test_every_graph_comes_back(w8a8: Dumped) -> None:
    reader, graphs = w8a8
    for stage, original in graphs.items():
        loaded = reader.graph(stage)
        assert to_text(loaded) == to_text(original)
        probe = probe_for(reader, original)
        for x, y in zip(interpret.run(original, probe), interpret.run(loaded, probe), strict=True):
            assert torch.equal(x, y)


def test_each_tensor_is_written_once(w8a8: Dumped) -> None:
    hashes = stored_hashes(w8a8[0].path)
    assert len(hashes) == len(set(hashes)) > 30
    assert not (w8a8[0].path / "04_calibrate" / "tensors.safetensors").exists()


def test_diffs_show_what_the_pass_did(w8a8: Dumped) -> None:
    reader = w8a8[0]
    assert reader.diff("00_trace") == reader.diff("04_calibrate") == ""
    smooth = reader.diff("03_smoothquant")
    assert "+%model.layers.0.input_layernorm.weight : f32[32] = weight amax=" in smooth
    changed = [line for line in smooth.splitlines() if line[0] in "+-"]
    assert not any("o_proj" in line for line in changed)
    canonical = reader.diff("01_canonicalize")
    assert "+%model.norm:rms_norm" in canonical and "-%rsqrt" in canonical
    assert "+%model.embed_tokens:embedding" not in canonical  # only its label is new


def test_text_by_glob(w8a8: Dumped) -> None:
    lines = w8a8[0].text("03_smoothquant", "*.q_proj:linear").splitlines()
    assert [line.split(" : ")[0] for line in lines] == [
        f"%model.layers.{i}.self_attn.q_proj:linear" for i in range(2)
    ]


def test_stages_by_index_and_name(w8a8: Dumped) -> None:
    reader = w8a8[0]
    assert reader.find() == reader.find("9") == reader.find("lower-matmuls") == STAGES[9]
    assert reader.find("outliers") == "06_outliers"
    assert reader.find("03") == reader.find("03_smoothquant") == "03_smoothquant"
    for wrong in ("smoothquatn", "10", "-1", "", "9" * 5000):
        with pytest.raises(StorageError, match="there is no stage"):
            reader.find(wrong)


def test_a_compile_writes_it(traced: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PANGUQ_DUMP", str(tmp_path / "dump"))
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    panguq.compile(traced[0], "float", calibration=ids)
    reader = DumpReader(tmp_path / "dump")
    assert run_stage(reader).output_sqnr_db == 999.0
    assert "calibration data: given by the caller: 2 sequences, 32 tokens" in reader.summary()


class Masked(nn.Module):
    """Not a language model; its masked scores hold infinities, which are no fault."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.second(hidden.masked_fill(hidden > 1, float("-inf")).softmax(-1))


def test_any_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [torch.randn(3, 8)]
    panguq.compile(
        Masked().eval(),
        "w8a8-dynamic",
        example_inputs=(torch.randn(3, 8),),
        calibration=data,
        dump_dir=tmp_path / "dump",
    )
    reader = DumpReader(tmp_path / "dump")
    result = run_stage(reader)
    assert result.output_sqnr_db > 20 and result.kl is None and result.top_tokens == ()
    assert bisect(reader, 20.0).clean


# --- weights that stay in the model's folder ----------------------------------------------------


@pytest.fixture(scope="module")
def from_folder(tmp_path_factory: pytest.TempPathFactory, dump_into: Any, traced: Any) -> Any:
    base = tmp_path_factory.mktemp("model")
    traced[0].save_pretrained(base / "model")
    model = LlamaForCausalLM.from_pretrained(base / "model").eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # what was changed after loading is in the dump
    given = (model, *trace_causal_lm(model))
    reader, _, graphs = dump_into(base / "dump", "w8a16", given=given)
    return base, reader, graphs


def test_weights_of_a_folder_are_not_copied(from_folder: Any) -> None:
    base, reader, graphs = from_folder
    with safe_open(str(base / "dump/00_trace/tensors.safetensors"), framework="pt") as file:
        assert len(list(file.keys())) == 2  # the changed norm and the rotary frequencies
    assert str(base / "model") in reader.summary()
    probe = reader.probe()
    expected = interpret.run(graphs["03_calibrate"], probe)[0]
    assert torch.equal(interpret.run(reader.graph("03_calibrate"), probe)[0], expected)


def test_a_moved_or_changed_model_folder(from_folder: Any, tmp_path: Path) -> None:
    base = from_folder[0]
    with pytest.raises(StorageError, match=r"model\.embed_tokens\.weight .*is not there"):
        DumpReader(base / "dump", tmp_path).graph("03_calibrate")
    moved = shutil.copytree(base / "model", tmp_path / "moved")
    DumpReader(base / "dump", moved).graph("03_calibrate")
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    with pytest.raises(StorageError, match=r"is not the one that was compiled"):
        DumpReader(base / "dump", moved).graph("03_calibrate")


# --- where it may be written --------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_old_dump_is_replaced(w8a8: Dumped, dump_into: Any, tmp_path: Path) -> None:
    shutil.copytree(w8a8[0].path, tmp_path / "dump")
    killed = tmp_path / "dump" / ".10_x.partial-00000000"
    killed.mkdir()
    (killed / "graph.txt").write_text("half")
    reader, _, _ = dump_into(tmp_path / "dump", "float")
    assert reader.stages == [*STAGES[:3], "03_lower-matmuls"]
    assert not killed.exists()


@pytest.mark.parametrize("place", ["notes.txt", "03_smoothquant/notes.txt", "mine/x", "link"])
def test_nothing_foreign_is_deleted(w8a8: Dumped, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "dump"
    shutil.copytree(w8a8[0].path, folder)
    (folder / place).parent.mkdir(exist_ok=True)
    if place == "link":
        (folder / "11_link").symlink_to(w8a8[0].path / "01_canonicalize")
    else:
        (folder / place).write_text("dear to me")
    before = tree(folder)
    with pytest.raises(StorageError, match="not part of a dump"):
        dump_module.Dump.open(folder, *_arguments(w8a8[0]))
    assert tree(folder) == before


def _arguments(reader: DumpReader) -> tuple[Any, ...]:
    return Recipe.named("float"), 0, "cpu", PassContext(reader.info.interface, WeightStore())


def test_two_compiles_cannot_dump_into_one_folder(w8a8: Dumped, tmp_path: Path) -> None:
    first = dump_module.Dump.open(tmp_path / "dump", *_arguments(w8a8[0]))
    assert first is not None
    before = tree(tmp_path)
    with pytest.raises(StorageError, match="another compile is dumping there"):
        dump_module.Dump.open(tmp_path / "dump", *_arguments(w8a8[0]))
    assert tree(tmp_path) == before
    first.close(CompileReport(target="cpu"))
    assert dump_module.Dump.open(tmp_path / "dump", *_arguments(w8a8[0])) is not None


def test_folders_that_only_look_like_dumps(w8a8: Dumped, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.txt").write_text("my own summary")
    with pytest.raises(StorageError, match=r"summary\.txt in it is not part of a dump"):
        dump_module.Dump.open(tmp_path / "a", *_arguments(w8a8[0]))
    assert (tmp_path / "a" / "summary.txt").read_text() == "my own summary"
    with pytest.raises(StorageError, match="is a file"):
        dump_module.Dump.open(tmp_path / "a" / "summary.txt", *_arguments(w8a8[0]))
    assert dump_module.Dump.open(tmp_path / "new" / "one", *_arguments(w8a8[0])) is not None
    assert dump_module.Dump.open(None, *_arguments(w8a8[0])) is None


# --- when something goes wrong ------------------------------------------------------------------


def test_a_full_disk_ends_the_dump_and_not_the_compile(
    dump_into: Any, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    write = stage_writer.write_file

    def until_full(path: Path, chunks: Iterable[Any]) -> None:
        if "04_calibrate" in str(path) and path.name == "graph.json":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, chunks)

    monkeypatch.setattr(stage_writer, "write_file", until_full)
    with caplog.at_level(logging.WARNING, "panguq"):
        reader, dump, graphs = dump_into(tmp_path / "dump")
    assert list(graphs) == STAGES[1:]  # the compile went on
    assert dump.stopped is not None and "No space left" in dump.stopped.message
    assert "stops here" in caplog.text and "free some space" in caplog.text
    assert reader.stages == STAGES[:4]
    assert "03_smoothquant" in reader.summary() and "04_calibrate" not in reader.summary()
    assert run_stage(reader).stage == "03_smoothquant"
    assert not list(reader.path.glob(".*"))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch, transformers
from panguq.dumps import stage_writer
import panguq
write = stage_writer.write_file
def until_killed(path, chunks):
    if sys.argv[2] in str(path):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, chunks)
stage_writer.write_file = until_killed
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.randint(3, 64, (2, 16))
panguq.compile(model, "w8a8-dynamic", calibration=ids, dump_dir=sys.argv[1])
"""


def test_a_kill_leaves_what_was_complete(tmp_path: Path) -> None:
    place = "07_quantize-weights"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "dump"), place])
    assert done.returncode == -9
    reader = DumpReader(tmp_path / "dump")
    assert reader.stages[-1] == "06_insert-fake-quant"
    assert list(reader.path.glob(".07_quantize-weights.partial-*/*"))
    assert run_stage(reader).output_sqnr_db > 20
    assert "06_insert-fake-quant" in reader.summary()
    for stage in reader.stages:
        shutil.rmtree(reader.path / stage)
    with pytest.raises(StorageError, match="no pass has ended"):
        run_stage(DumpReader(tmp_path / "dump"))


def test_a_failure_can_be_seen_again(dump_into: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """With the statistics that calibration had left, to the last bit."""
    search = quantize_weights.search_scale

    def fail(weight: Any, group: int, spec: Any, importance: Any, ratios: Any) -> Any:
        if weight.shape[1] == 48:
            raise NumericsError(f"importance {importance.double().sum().item()!r}", "a hint")
        return search(weight, group, spec, importance, ratios)

    monkeypatch.setattr(quantize_weights, "search_scale", fail)
    with pytest.raises(NumericsError, match="first seen by pass 05") as first:
        dump_into(tmp_path / "my dump", "w8a16")
    reader = DumpReader(tmp_path / "my dump")
    stage = "05_quantize-weights.FAILED"
    assert reader.stages[-1] == stage and reader.find("5") == stage
    assert reader.find() == "04_insert-fake-quant"
    assert f"{stage}  NumericsError: importance" in reader.summary()
    assert reader.text(stage) == reader.text("04_insert-fake-quant")
    said = reader.error(stage)
    assert f"panguq run '{tmp_path / 'my dump'}' --limit {stage}" in said
    assert "Hint: a hint" in said and "Traceback" in said

    with pytest.raises(NumericsError) as again:
        run_stage(reader, stage)
    assert again.value.message == first.value.message

    monkeypatch.undo()
    result = run_stage(reader, stage)
    assert result.output_sqnr_db > 30 and "did not fail now" in result.render()


def test_a_failure_is_seen_again_with_the_weights_of_tokens(
    dump_into: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """What weigh-tokens found scales the inputs of GPTQ's problems."""

    def fail(self: Gptq, problem: WeightProblem) -> Solution:
        energy = sum(x.double().square().sum().item() for x in problem.inputs)
        raise NumericsError(f"inputs {energy!r} of {problem.names}")

    monkeypatch.setattr(Gptq, "solve", fail)
    with pytest.raises(NumericsError, match="inputs") as first:
        dump_into(tmp_path / "dump", "w4a16-gptq")
    with pytest.raises(NumericsError) as again:
        run_stage(DumpReader(tmp_path / "dump"), "gptq")
    assert again.value.message == first.value.message


def test_a_failure_before_calibration(traced: Any, tmp_path: Path) -> None:
    recipe = Recipe.named("w8a8-dynamic").with_schemes({"*.nothing": "FLOAT"})
    with pytest.raises(RecipeError, match="matches no matmul"):
        panguq.compile(traced[0], recipe, dump_dir=tmp_path / "dump")
    reader = DumpReader(tmp_path / "dump")
    with pytest.raises(RecipeError, match="matches no matmul"):
        run_stage(reader, "2")
    with pytest.raises(StorageError, match="the compile ended before it had calibration data"):
        run_stage(reader, "1")


# --- damage -------------------------------------------------------------------------------------


def _edit(name: str, **fields: Any) -> Any:
    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | fields))
        (folder / name).with_name(CHECKSUMS).unlink()  # no accident

    return change


def _cut(name: str) -> Any:
    def change(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size * 2 // 3)

    return change


def _flip(name: str) -> Any:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 1
        (folder / name).write_bytes(data)

    return change


def _remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _pipe(name: str) -> Any:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


DAMAGE = {
    "cut dump.json": (_cut("dump.json"), "dump.json"),
    "version": (_edit("dump.json", version=2), r"dump\.json: version"),
    "extra": (_edit("dump.json", run="os.system"), r"dump\.json: run"),
    "no dump.json": (_remove("dump.json"), "not a dump"),
    "cut stage": (_cut("03_smoothquant/stage.json"), "03_smoothquant/stage.json"),
    "stage type": (_edit("03_smoothquant/stage.json", index="3"), r"stage\.json: index"),
    "cut graph": (_cut("03_smoothquant/graph.json"), "graph.json: its checksum"),
    "flipped graph": (_flip("03_smoothquant/graph.json"), "graph.json: its checksum"),
    "no graph": (_remove("03_smoothquant/graph.json"), "graph.json: missing"),
    "pipe": (_pipe("03_smoothquant/graph.json"), "graph.json: not a regular file"),
    "flipped summary": (_flip("summary.txt"), "summary.txt: its checksum"),
    "flipped text": (_flip("03_smoothquant/graph.txt"), "graph.txt: its checksum"),
    "flipped table": (_flip("03_smoothquant/skipped.csv"), "skipped.csv: its checksum"),
    "flipped probe": (_flip("probe.safetensors"), "probe.safetensors: its checksum"),
    "flipped list": (_flip("03_smoothquant/SHA256SUMS"), "03_smoothquant/"),
    "cut tensors": (_cut("00_trace/tensors.safetensors"), "00_trace/tensors.safetensors"),
    "flipped tensors": (_flip("03_smoothquant/tensors.safetensors"), "03_smoothquant/tensors"),
    "no tensors": (_remove("03_smoothquant/tensors.safetensors"), "is missing"),
    "cut probe": (_cut("probe.safetensors"), "probe.safetensors"),
    "no probe": (_remove("probe.safetensors"), "probe.safetensors: missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(w8a8: Dumped, tmp_path: Path, name: str) -> None:
    change, message = DAMAGE[name]
    folder = shutil.copytree(w8a8[0].path, tmp_path / "dump")
    change(folder)
    with pytest.raises(StorageError, match=message):
        run_stage(DumpReader(folder), "3")
