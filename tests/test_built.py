"""Built models: bodies equal to ops, parts equal to the graph, the cache, and one real build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._inductor import config as inductor_config
from transformers import LlamaConfig, LlamaForCausalLM

import panguq
from panguq.built.bodies import bodies
from panguq.built.build import count_differing, example_inputs
from panguq.built.built_graph import BuildPlan, _few, _joined, find_build
from panguq.built.cache_folder import cache_folder, check_own, locked, make_cache_folder
from panguq.built.compile_part import ValueLayout
from panguq.built.int8_sums import LIBRARY, compile_int8_sums, int8_sums, load_int8_sums, sums_of
from panguq.built.machine import cpu_features
from panguq.built.parts import GraphPart, cut, digest, part_module, stored_tensor
from panguq.cli import main
from panguq.decibels import sqnr_db
from panguq.errors import LoweringError, StorageError
from panguq.ir.ops.canonical import rms_norm, rotary, swiglu
from panguq.ir.ops.packing import pack_int4
from panguq.ir.ops.quantize import quantize_per_token
from panguq.kernels.cpu.dequantized_linear import dequantized_linear
from panguq.kernels.cpu.int4_linear import int4_kernel_scales, int4_kernel_weight, int4_linear
from panguq.kernels.cpu.int8_linear import int8_linear
from panguq.kernels.cpu.int8_weight_linear import int8_weight_linear
from panguq.recipe import Recipe

aten = torch.ops.aten
SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
IDS = torch.arange(80).reshape(2, 40)
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None
HAS_VNNI = "avx512_vnni" in cpu_features()


RECIPE = Recipe.of("w4a16").with_schemes(
    {
        "*.[qkv]_proj": "W8A8", "*.o_proj": "W4A8", "*.down_proj": "W8A8_DYNAMIC",
        "lm_head": "W8A16",
    }
)  # fmt: skip


def source(layers: int = 1) -> Any:
    """A tiny Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES)).eval()


def compiled(layers: int) -> Any:
    """It with every kind of matmul of the CPU target."""
    return panguq.compile(source(layers), RECIPE, calibration=[IDS])


@pytest.fixture(scope="module")
def model() -> Any:
    return compiled(layers=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("PANGUQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- bodies: what the compiler is given computes what the op documents -------------------------


@given(
    m=st.integers(1, 3), n=st.integers(1, 20), k=st.integers(2, 2100), few=st.booleans(),
    own=st.booleans(), static=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_integer_sums_are_exact(
    m: int, n: int, k: int, few: bool, own: bool, static: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    extreme = torch.tensor([-128, -127, 0, 127], dtype=torch.int8)
    codes = extreme[torch.randint(0, 4, (m, k), generator=generator)]
    weight = extreme[torch.randint(0, 4, (n, k), generator=generator)]
    act_scale = torch.ones(1) if static else torch.ones(m, 1)
    zero_point = torch.tensor([3], dtype=torch.int32) if static else None
    call = (codes, act_scale, zero_point, weight, torch.ones(n), None, None, torch.float64)
    wanted = (codes.double() - (3 if static else 0)) @ weight.double().t()
    # Sums beyond 2^24 are rounded once, when they become float32, as in the op.
    assert torch.equal(bodies(few, own)[int8_linear](*call), wanted.float().double())


@pytest.mark.skipif(not (HAS_COMPILER and HAS_VNNI), reason="no compiler, or no AVX512_VNNI")
def test_the_library_of_integer_sums_is_exact(tmp_path: Path) -> None:
    compile_int8_sums(tmp_path / LIBRARY)
    loaded, generator = load_int8_sums(tmp_path / LIBRARY), torch.Generator().manual_seed(0)
    for m, n, k in ((1, 1, 1), (1, 5, 63), (2, 8, 64), (3, 9, 2100)):
        codes = torch.randint(-128, 128, (m, k), generator=generator).char()
        weight = torch.randint(-128, 128, (n, k), generator=generator).char()
        assert torch.equal(sums_of(loaded, codes, weight), int8_sums(codes, weight))


def test_a_processor_without_vnni_has_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("panguq.built.int8_sums.cpu_features", lambda: ("avx2", "avx512f"))
    with pytest.raises(LoweringError, match="has no avx512bw, avx512_vnni"):
        compile_int8_sums(tmp_path / LIBRARY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_only_bodies_agree_with_their_ops(few: bool, bias: bool) -> None:
    torch.manual_seed(0)
    x, added = torch.randn(2, 3, 64), torch.randn(48) if bias else None
    codes = torch.randint(-8, 8, (48, 64), dtype=torch.int8)
    packed, scale = pack_int4(codes), torch.rand(48, 2) + 0.1
    zero = torch.randint(-3, 4, (48, 2), dtype=torch.int8)
    kernel = (int4_kernel_weight(packed), int4_kernel_scales(scale, zero))
    limit = 6 if few else 0
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (int4_linear, (x, *kernel, packed, scale, zero, 32, added, limit)),
        (int8_weight_linear, (x, codes, scale[:, 0].contiguous(), added, limit)),
        (dequantized_linear, (x, packed, scale, zero, 32, added, torch.float32)),
        (dequantized_linear, (x, codes, scale, None, 32, added, torch.float32)),
        (dequantized_linear, (x, packed, scale, zero, 32, added, torch.bfloat16)),
    ]
    for op, arguments in calls:
        wanted = op(*arguments)
        # Only the order of a sum differs; the few results that bfloat16 then rounds the other way
        # leave 60 dB.
        assert sqnr_db(wanted, bodies(few)[op](*arguments)) > 60, op


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_rotary_body_agrees_with_its_op(interleaved: bool) -> None:
    torch.manual_seed(0)
    x, cos, sin = torch.randn(2, 4, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    found = bodies(True)[rotary](x, cos, sin, interleaved)
    torch.testing.assert_close(found, rotary(x, cos, sin, interleaved))


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_bodies_round_as_their_ops_do(dtype: torch.dtype) -> None:
    """So that no int8 code behind them differs: no sum's order shows, and nothing is contracted."""
    torch.manual_seed(0)
    x, gain = torch.randn(1, 33, 192).to(dtype), torch.rand(192).to(dtype)
    cos, sin = torch.rand(2, 1, 33, 64).to(dtype)

    def layer(norm: Any, turn: Any, act: Any, quantize: Any) -> tuple[torch.Tensor, ...]:
        normed = norm(x, gain, 1e-5, 0.0, False)
        heads = normed.unflatten(-1, (3, 64)).transpose(1, 2)
        return *quantize(act(normed, x), 127), turn(heads, cos, sin)

    ops = (rms_norm, rotary, swiglu, quantize_per_token)
    options = {"emulate_precision_casts": True}
    code = torch.compile(lambda: layer(*(bodies(False)[op] for op in ops)), options=options)
    for wanted, found in zip(layer(*ops), code(), strict=True):
        assert torch.equal(wanted, found)


def test_values_that_round_otherwise_are_counted_and_wrong_ones_refused() -> None:
    wanted, other = torch.randn(64), torch.zeros(8)
    found = wanted.clone()
    found[3] = found[3].nextafter(torch.tensor(9.0))
    assert count_differing([wanted, other], [found, other]) == 1
    for wrong in (wanted.flip(0), wanted.double(), wanted[:5], wanted / 0):
        with pytest.raises(LoweringError, match="other numbers than the graph"):
            count_differing([wanted], [wrong])


# --- parts ------------------------------------------------------------------------------------


def uncompiled(plan: BuildPlan, part: GraphPart) -> Any:
    module = part_module(part, lambda target: target)
    weights = [stored_tensor(plan.gm, node) for node in part.weights]
    return lambda *values: module(*values, *weights)


def test_most_of_the_weights_say_up_to_how_many_tokens_are_few(model: Any) -> None:
    """One where an integer matmul reads its weight row by row."""
    assert BuildPlan.of(model.executable, model.interface).few == 1
    graph = fx.Graph()
    for limit, rows in ((9, 48), (30, 64), (80, 32), (0, 512)):
        weight = graph.get_attr(f"weight_{rows}")
        rest = (weight, weight, weight, None, 32, None, limit)
        graph.call_function(int4_linear, (weight, weight, *rest))
    gm = fx.GraphModule({f"weight_{n}": torch.zeros(n, 4) for n in (48, 64, 32, 512)}, graph)
    assert _few(gm) == 30


def test_parts_joined_are_the_graph(model: Any) -> None:
    plan = BuildPlan.of(model.executable, model.interface)
    joined = _joined(plan, [uncompiled(plan, part) for part in plan.parts])
    for sizes in ((2, 3, 5), (1, 1, 4), (1, 6, 0)):
        given, again = example_inputs(plan, *sizes), example_inputs(plan, *sizes)
        for found, wanted in zip(joined(*given), model.executable(*again), strict=True):
            assert torch.equal(found, wanted)


def test_equal_layers_share_their_code() -> None:
    deep = compiled(layers=4)
    plan = BuildPlan.of(deep.executable, deep.interface)
    texts = [digest(part.text(plan.describe)) for part in plan.parts]
    first, *middle, last = texts
    first_rotary, *middle = middle  # behind the tables, whose sines are torch's own
    assert len(texts) == 6 and len(set(middle)) == 1
    assert len({first, first_rotary, middle[0], last}) == 4
    stay = [step.target for step in plan.steps if isinstance(step, fx.Node)]
    assert stay.count(torch.ops.panguq.attention.default) == 4
    assert stay.count(int8_weight_linear) == 1  # the head, which is faster as it is


def test_memory_is_read_after_it_is_written() -> None:
    """Also where what is written is known later than all else."""
    graph = fx.Graph()
    x, memory = graph.placeholder("x"), graph.placeholder("memory")
    query = graph.call_function(aten.neg.default, (x,))
    late = graph.call_function(aten.neg.default, (graph.call_function(aten.sin.default, (x,)),))
    place = graph.call_function(aten.slice.Tensor, (memory, 2, 0, 1))
    graph.call_function(aten.copy_.default, (place, late))
    view = graph.call_function(aten.slice.Tensor, (memory, 2, 0, 1))
    graph.output(graph.call_function(aten.mul.Tensor, (query, view)))
    computed = (aten.neg.default,)
    steps = cut(fx.GraphModule({}, graph), lambda node: node.target not in computed)
    order = [str(step.target) for step in steps if isinstance(step, fx.Node)]
    assert order == [
        "aten.sin.default", "aten.slice.Tensor", "aten.copy_.default", "aten.slice.Tensor",
        "aten.mul.Tensor",
    ]  # fmt: skip


def test_a_value_that_lies_in_another_way_is_laid_out_anew() -> None:
    one, other = torch.randn(2, 3, 4, 5), torch.randn(3, 3, 6, 5)
    layout = ValueLayout.of(one.transpose(1, 2), other.transpose(1, 2))
    assert layout == ValueLayout(order=(0, 2, 1, 3), varying=(0, 1))
    fitting = torch.randn(7, 3, 2, 5).transpose(1, 2)
    assert layout.bring(fitting) is fitting
    copied = layout.bring(fitting.contiguous())
    assert copied.stride() == fitting.stride() and torch.equal(copied, fitting)


# --- the cache --------------------------------------------------------------------------------


def test_a_cache_that_is_not_safe_is_refused(cache: Path, model: Any, caplog: Any) -> None:
    folder = make_cache_folder()
    assert folder == cache / "built" and folder.stat().st_mode & 0o777 == 0o700
    check_own(folder)
    folder.chmod(0o770)
    with pytest.raises(StorageError, match="others may write into"):
        make_cache_folder()
    report = model.build()
    assert not report.is_built and "others may write into" in report.reasons[0]
    assert [r.message for r in caplog.records] == [
        f"not built, the graph runs uncompiled: {report.reasons[0]}"
    ]
    folder.rmdir()
    folder.symlink_to(cache)
    with pytest.raises(StorageError, match="is a link"):
        make_cache_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_another_user_is_refused(cache: Path) -> None:
    os.chown(make_cache_folder(), 12345, -1)
    with pytest.raises(StorageError, match="belongs to another user"):
        make_cache_folder()


def test_a_cache_that_cannot_be_written_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PANGUQ_CACHE", str(tmp_path / "file"))
    report = model.build()
    assert not report.is_built and "cannot be made: File exists" in report.reasons[0]
    monkeypatch.setenv("PANGUQ_CACHE", "here")
    assert "is not an absolute path" in model.build().reasons[0]
    assert model(IDS).logits.shape == (2, 40, 96)


def test_one_process_builds_and_the_other_waits(cache: Path) -> None:
    folder, order = make_cache_folder(), []

    def second() -> None:
        with locked(folder, "name"):
            order.append("second")

    with locked(folder, "name"):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]


def test_without_a_compiler_the_graph_runs_and_it_is_said(
    cache: Path, model: Any, caplog: Any
) -> None:
    wanted = model(IDS).logits
    with inductor_config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        report = model.build()
    assert report.reasons == ("there is no C++ compiler",) and not report.is_built
    assert caplog.messages == ["not built, the graph runs uncompiled: there is no C++ compiler"]
    assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
def test_a_compiler_that_fails_is_quoted_and_the_graph_runs(
    cache: Path, model: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "g++"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *.cpp*) echo "x.cpp:1: error: had enough" >&2; exit 1;; esac\n'
        'exec g++ "$@"\n'
    )
    broken.chmod(0o755)
    with inductor_config.patch({"cpp.cxx": (str(broken),)}):
        report = model.build()
    assert not report.is_built and report.reasons[0].startswith("the C++ compiler fails: ")
    assert list(cache_folder().glob("[!.]*")) == []
    assert model(IDS).logits.shape == (2, 40, 96)


# --- one real build, shared by all that follows ------------------------------------------------


@pytest.fixture(scope="module")
def build(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, Path]]:
    """The model built (half a minute: a compiler of C++ runs), its report, and its cache."""
    if not HAS_COMPILER:
        pytest.skip("there is no C++ compiler")
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PANGUQ_CACHE", str(place))
        report = model.build()
        yield model, report, place
    model._forget_built()


def test_a_built_model_gives_the_numbers_of_its_graph(build: Any) -> None:
    model, report, _ = build
    assert report.is_built and report.reasons == ()
    assert 0 <= report.differing < report.compared
    assert report.libraries == 4 + (report.folder / LIBRARY).exists()
    built, plan = model._running(), BuildPlan.of(model.executable, model.interface)
    assert plan.few == 1
    for sizes in ((1, 1, 6), (1, 1, 30), (1, 300, 0), (3, 120, 2), (2, 2, 3)):
        given, again = example_inputs(plan, *sizes), example_inputs(plan, *sizes)
        for found, wanted in zip(built(*given), model.executable(*again), strict=True):
            assert found.shape == wanted.shape
            assert sqnr_db(wanted, found) > 40, sizes  # rounding ties of int8 inputs


def test_a_built_model_generates(build: Any) -> None:
    model, _, _ = build
    found = model.generate(IDS[:1, :4], max_new_tokens=6, do_sample=False)
    graph = model.at_stage("lowered")
    graph._looked_up = True  # as if nothing were in the cache
    assert torch.equal(found, graph.generate(IDS[:1, :4], max_new_tokens=6, do_sample=False))
    padded = torch.ones_like(IDS)
    padded[0, :5] = 0
    wanted = graph(IDS, attention_mask=padded).logits
    assert sqnr_db(wanted, model(IDS, attention_mask=padded).logits) > 40


def test_a_loaded_model_finds_its_code_in_the_cache_alone(build: Any, tmp_path: Path) -> None:
    model, report, place = build
    model.save(tmp_path / "saved")
    assert not any(path.suffix == ".so" for path in (tmp_path / "saved").rglob("*"))
    loaded: Any = panguq.load(tmp_path / "saved")
    loaded(IDS)
    assert loaded._built is not None
    again = loaded.build()
    assert again.folder == report.folder and again.libraries == 0 and again.seconds == 0.0
    assert {p.name.partition("-")[0] for p in report.folder.iterdir()} == {
        "few", "many", "built.json", *({LIBRARY} if HAS_VNNI else ()),
    }  # fmt: skip
    written = [*place.glob("built/*"), *report.folder.iterdir()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in written)


def test_the_command_line_builds(build: Any, tmp_path: Path, capsys: Any) -> None:
    """Into the same cache, where the code of an equal graph is found."""
    _, report, place = build
    source().save_pretrained(tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml(), encoding="utf-8")
    given = ["compile", tmp_path / "source", "--recipe", tmp_path / "recipe.yaml", "--build"]
    short = ["--window", "8", "--windows", "2"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PANGUQ_CACHE", str(place))
        assert main([str(word) for word in (*given, *short, "--out", tmp_path / "made")]) == 0
    assert f"built in {report.folder}: 0 s" in capsys.readouterr().out
    assert not any(path.suffix == ".so" for path in (tmp_path / "made").rglob("*"))


def test_damaged_code_is_not_run(build: Any) -> None:
    model, report, _ = build
    plan = BuildPlan.of(model.executable, model.interface)
    library = next(report.folder.glob("few-*.so"))
    whole = library.read_bytes()
    library.unlink()  # a new file: the old one is mapped, and runs
    try:
        library.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert find_build(plan) is None
        library.write_bytes(whole)
        library.chmod(0o666)
        with pytest.raises(StorageError, match="others may write into"):
            find_build(plan)
    finally:
        library.write_bytes(whole)
        library.chmod(0o600)
    assert find_build(plan) == report.folder


def test_code_for_another_processor_is_not_run_and_it_is_said(
    build: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    model, _, _ = build
    monkeypatch.setattr("panguq.built.machine.cpu_features", lambda: ("avx",))
    elsewhere = model.at_stage("lowered")
    elsewhere(IDS)
    assert elsewhere._built is None
    assert "a processor with other features" in caplog.text and len(caplog.records) == 1


def elsewhere(model: Any, place: Path, first: str, masks: dict[str, str]) -> tuple[float, str, str]:
    """What a model gives in another process: the sum of logits, whether it is built, what it says.

    The process computes in the types that tests do (tests/conftest.py)."""
    code = (
        "import sys, torch, panguq; from panguq.kernels.cpu import multiplying;"
        "multiplying.bfloat16_is_faster = multiplying.float32_is_faster = lambda: False;"
        f"{first}; m = panguq.load(sys.argv[1]);"
        "print(m(torch.arange(80).reshape(2, 40)).logits.double().sum().item(), bool(m._built))"
    )
    model.save(place)
    result = subprocess.run(
        [sys.executable, "-c", code, str(place)],
        capture_output=True, text=True, check=True, env={**os.environ, **masks},
    )  # fmt: skip
    total, found = result.stdout.split()
    return float(total), found, result.stderr


def test_with_features_masked_the_graph_runs_and_gives_the_same(build: Any) -> None:
    """As on a processor without VNNI or bfloat16: other code is looked for, and is not there."""
    model, _, place = build
    masks = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    total, found, said = elsewhere(model, place / "masked", "pass", masks)
    assert found == "False" and "a processor with other features" in said
    assert total == pytest.approx(model(IDS).logits.double().sum().item(), rel=1e-2)


def test_built_code_follows_the_number_of_threads(build: Any) -> None:
    model, _, place = build
    total, found, _ = elsewhere(model, place / "threads", "torch.set_num_threads(2)", {})
    assert found == "True"
    assert total == pytest.approx(model(IDS).logits.double().sum().item(), rel=1e-2)


def test_the_list_of_a_build_names_its_libraries(build: Any) -> None:
    _, report, _ = build
    entries = json.loads((report.folder / "built.json").read_text())
    used = {part["library"] for parts in entries["modes"].values() for part in parts if part}
    assert used == set(entries["libraries"]) - {LIBRARY}
