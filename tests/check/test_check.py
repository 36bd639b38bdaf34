"""`panguq check`: good folders are taken, and each rule has a broken folder that makes it fire."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from panguq.check.ascend import ASCEND_RULES
from panguq.check.compressed_tensors import COMPRESSED_TENSORS_RULES
from panguq.check.files import FILE_RULES
from panguq.check.report import RULES, check_folder
from panguq.cli import main
from panguq.errors import InputError, StorageError
from tests.check.check_folders import (
    DOWN,
    GATE,
    LAYER,
    VOCAB,
    Draft,
    Q,
    ascend,
    compressed,
    group,
)

Change = Callable[[Draft], object]
ASCEND_SERVERS = {"vllm-ascend", "mindie", "sglang"}
COMPRESSED_SERVERS = {"transformers", "vllm", "vllm-ascend", "sglang"}


def drop(*names: str) -> Change:
    def change(draft: Draft) -> None:
        for name in names:
            draft.tensors.pop(name, None)

    return change


def undescribe(name: str) -> Change:
    return lambda draft: draft.description.pop(name)  # type: ignore[union-attr]


def describe(name: str, kind: str) -> Change:
    return lambda draft: draft.description.update({name: kind})  # type: ignore[union-attr]


def store(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda draft: draft.tensors.update({name: make(draft.tensors[name])})


def add(name: str, tensor: torch.Tensor) -> Change:
    return lambda draft: draft.tensors.update({name: tensor})


def configure(**changed: Any) -> Change:
    return lambda draft: draft.config.update(changed)  # type: ignore[union-attr]


def setting(**changed: Any) -> Change:
    return lambda draft: draft.config["quantization_config"].update(changed)  # type: ignore[index]


def regroup(*args: Any, **more: Any) -> Change:
    return setting(config_groups={"group_0": group(*args, **more)})


def attribute(**changed: Any) -> Change:
    def change(draft: Draft) -> None:
        for name, value in changed.items():
            setattr(draft, name, value)

    return change


def both(*changes: Change) -> Change:
    def change(draft: Draft) -> None:
        for one in changes:
            one(draft)

    return change


def index_of(draft: Draft) -> dict[str, str]:
    return dict.fromkeys(draft.tensors, f"{draft.stem}.safetensors")


def with_index(**changed: str) -> Change:
    def change(draft: Draft) -> None:
        draft.index = index_of(draft) | changed

    return change


def described_elsewhere(draft: Draft) -> None:
    draft.files["quant_model_description_w8a8.json"] = json.dumps(draft.description)
    draft.description = None


def large_head(draft: Draft) -> None:
    n = 65536
    draft.config |= {"vocab_size": n}  # type: ignore[operator]
    draft.tensors["model.embed_tokens.weight"] = torch.zeros(n, 256).bfloat16()
    draft.tensors["lm_head.weight"] = torch.ones(n, 256, dtype=torch.int8)
    draft.tensors["lm_head.weight_scale"] = torch.ones(n, 1)
    draft.tensors["lm_head.weight_offset"] = torch.zeros(n, 1)
    parts = ("weight", "weight_scale", "weight_offset")
    draft.description |= {f"lm_head.{leaf}": "W8A16" for leaf in parts}  # type: ignore[operator]


def half_bad_shard(draft: Draft) -> None:
    draft.moved = {f"{DOWN}.weight": "second.safetensors"}
    draft.truncated = "second.safetensors"


def bias_in_bfloat16(draft: Draft) -> None:
    parts = {leaf: draft.tensors[f"{Q}.{leaf}"] for leaf in ("bias", "deq_scale", "weight")}
    steps = (parts["bias"] / parts["deq_scale"]).bfloat16().float()
    offset = draft.tensors[f"{Q}.input_offset"]
    rounded = (steps - offset * parts["weight"].sum(1)).round()
    draft.tensors[f"{Q}.quant_bias"] = rounded.to(torch.int32)


NOTE: set[str] = set()
FILES: list[tuple[str, str, Change, set[str]]] = [
    ("damaged-file", "model", attribute(truncated="model.safetensors"), COMPRESSED_SERVERS),
    ("damaged-file", "model", half_bad_shard, COMPRESSED_SERVERS),
    (
        "damaged-file",
        f"{LAYER}.mlp",
        lambda draft: draft.files.update({"model.safetensors.index.json": "{"}),
        COMPRESSED_SERVERS,
    ),
    ("no-weights", "*.safetensors", attribute(tensors={}), COMPRESSED_SERVERS),
    (
        "missing-shard",
        "gone.safetensors",
        with_index(**{f"{DOWN}.weight": "gone.safetensors"}),
        COMPRESSED_SERVERS,
    ),
    (
        "index-disagrees",
        f"{DOWN}.weight",
        both(with_index(), drop(f"{DOWN}.weight")),
        COMPRESSED_SERVERS,
    ),
    (
        "index-disagrees",
        "extra",
        both(with_index(), add("extra", torch.ones(1))),
        COMPRESSED_SERVERS,
    ),
    ("missing-weight", "model.norm.weight", drop("model.norm.weight"), COMPRESSED_SERVERS),
    ("no-tokenizer", "tokenizer.json", attribute(files={}), NOTE),
    ("unknown-model", "config.json", configure(model_type="mine"), NOTE),
    ("uneven-experts", "config.json", configure(num_experts=61, moe_intermediate_size=1343), NOTE),
    ("no-class", "config.json", configure(model_type="mine"), {"transformers"}),
]  # fmt: skip
BROKEN_ASCEND: list[tuple[str, str, dict[str, str], Change, set[str]]] = [
    ("missing-config", "config.json", {}, attribute(config=None), ASCEND_SERVERS),
    ("no-description", "quant_model_description.json", {}, described_elsewhere, ASCEND_SERVERS),
    (
        "leftover-quantization-config",
        "config.json",
        {},
        configure(quantization_config={"quant_method": "compressed-tensors"}),
        {"vllm-ascend"},
    ),
    ("described-missing", f"{Q}.bias", {}, drop(f"{Q}.bias"), ASCEND_SERVERS),
    ("undescribed-module", "lm_head.weight", {}, undescribe("lm_head.weight"),
     {"vllm-ascend", "mindie"}),
    ("undescribed-module", f"{GATE}.weight", {}, undescribe(f"{GATE}.weight"),
     {"vllm-ascend", "mindie"}),
    (
        "undescribed-norm-bias",
        "model.norm.bias",
        {},
        add("model.norm.bias", torch.ones(256)),
        {"vllm-ascend"},
    ),
    ("undescribed-tensor", f"{Q}.bias", {}, undescribe(f"{Q}.bias"), NOTE),
    ("unknown-type", f"{DOWN}.weight", {}, describe(f"{DOWN}.weight", "W9A9"), ASCEND_SERVERS),
    ("no-kernel", f"{DOWN}.weight", {"attention": "W4A8_DYNAMIC", "mlp": "W4A8_DYNAMIC"},
     lambda draft: None, {"sglang"}),
    ("computes-otherwise", f"{GATE}.weight", {"mlp": "W4A8_DYNAMIC"}, lambda draft: None, NOTE),
    ("too-large", "lm_head.weight", {}, large_head, ASCEND_SERVERS),
    (
        "mixed-fused-types",
        f"{LAYER}.mlp.gate_up_proj",
        {},
        describe(f"{GATE}.weight", "W8A8_DYNAMIC"),
        {"vllm-ascend"},
    ),
    (
        "w4a8-bias",
        f"{Q}.bias",
        {"attention": "W4A8_DYNAMIC"},
        both(
            add(f"{Q}.bias", torch.ones(256)),
            describe(f"{Q}.bias", "FLOAT"),
        ),
        {"mindie", "vllm-ascend"},
    ),
    (
        "w4a8-groups",
        f"{DOWN}.weight_scale_second",
        {"mlp": "W4A8_DYNAMIC"},
        both(
            drop(f"{DOWN}.weight_scale_second"), undescribe(f"{DOWN}.weight_scale_second")
        ),
        {"mindie", "vllm-ascend"},
    ),
    ("w8a16-bias", f"{Q}.bias", {"attention": "W8A16"}, lambda draft: None, NOTE),
    ("float32-model", "config.json", {}, configure(dtype="float32"), NOTE),
    ("missing-part", f"{Q}.deq_scale", {},
     both(drop(f"{Q}.deq_scale"), undescribe(f"{Q}.deq_scale")), ASCEND_SERVERS),
    ("wrong-dtype", f"{Q}.quant_bias", {}, store(f"{Q}.quant_bias", lambda t: t.long()),
     ASCEND_SERVERS),
    ("wrong-dtype", "model.norm.weight", {}, store("model.norm.weight", lambda t: t.to(torch.int8)),
     ASCEND_SERVERS),
    ("wrong-shape", f"{GATE}.weight_scale", {}, store(f"{GATE}.weight_scale", torch.ravel),
     ASCEND_SERVERS),
    ("wrong-shape", "lm_head.weight", {}, store("lm_head.weight", lambda t: t[: VOCAB // 2]),
     ASCEND_SERVERS),
    ("deq-scale-dtype", f"{Q}.deq_scale", {"dtype": "float16"},
     store(f"{Q}.deq_scale", lambda t: t.to(torch.int32).view(torch.float32)), ASCEND_SERVERS),
    ("deq-scale-dtype", f"{Q}.deq_scale", {},
     store(f"{Q}.deq_scale", lambda t: t.view(torch.int32).long()), ASCEND_SERVERS),
    ("bad-scale", f"{Q}.input_scale", {}, store(f"{Q}.input_scale", torch.zeros_like),
     ASCEND_SERVERS),
    ("bad-scale", f"{Q}.input_scale", {}, store(f"{Q}.input_scale", torch.neg), ASCEND_SERVERS),
    ("bad-scale", f"{GATE}.weight_scale", {},
     store(f"{GATE}.weight_scale", lambda t: t * torch.nan), ASCEND_SERVERS),
    ("input-offset", f"{Q}.input_offset", {}, store(f"{Q}.input_offset", lambda t: t + 200),
     ASCEND_SERVERS),
    ("input-offset", f"{Q}.input_offset", {}, store(f"{Q}.input_offset", lambda t: t + 0.5),
     ASCEND_SERVERS),
    ("asymmetric-weight", f"{Q}.weight_offset", {}, store(f"{Q}.weight_offset", torch.ones_like),
     ASCEND_SERVERS),
    ("asymmetric-weight", f"{DOWN}.weight_offset", {},
     store(f"{DOWN}.weight_offset", torch.ones_like), {"vllm-ascend"}),
    ("code-range", f"{DOWN}.weight", {"mlp": "W4A4_DYNAMIC"},
     store(f"{DOWN}.weight", lambda t: t + 8), ASCEND_SERVERS),
    ("deq-scale-value", f"{Q}.deq_scale", {}, store(f"{Q}.deq_scale", lambda t: t * 1.001),
     ASCEND_SERVERS),
    ("quant-bias-value", f"{Q}.quant_bias", {}, store(f"{Q}.quant_bias", torch.zeros_like),
     ASCEND_SERVERS),
    ("quant-bias-rounded", f"{Q}.quant_bias", {}, bias_in_bfloat16, NOTE),
    ("quant-bias-value", f"{Q}.quant_bias", {"dtype": "float16"},
     store(f"{Q}.quant_bias", lambda t: -t), ASCEND_SERVERS),
    ("scale-bias-value", f"{DOWN}.scale_bias", {"mlp": "W4A8_DYNAMIC"},
     store(f"{DOWN}.scale_bias", lambda t: t / 8), ASCEND_SERVERS),
    ("input-scale-rounded", f"{Q}.input_scale", {},
     store(f"{Q}.input_scale", lambda t: t * (1 + 2**-12)), NOTE),
    ("fused-input-scale", f"{LAYER}.self_attn.qkv_proj.input_scale", {},
     store(f"{Q}.input_scale", lambda t: t * 2), {"vllm-ascend"}),
]  # fmt: skip
STATIC, PACKED = dict(activation="static"), dict(activation=None)
BROKEN_COMPRESSED: list[tuple[str, str, dict[str, Any], Change, set[str]]] = [
    ("unknown-method", "config.json", {}, setting(quant_method="bitsandbytes"), COMPRESSED_SERVERS),
    ("no-groups", "config.json", {}, setting(config_groups={}), COMPRESSED_SERVERS),
    ("no-scheme", "group_0", {"bits": 4}, lambda draft: None, {"vllm", "vllm-ascend", "sglang"}),
    ("no-scheme", "group_0", PACKED, lambda draft: None, {"vllm-ascend", "sglang"}),
    ("no-scheme", "group_0", {}, regroup(8, "dynamic", "int-quantized", symmetric=False),
     {"vllm", "vllm-ascend", "sglang"}),
    ("format-not-inferred", "group_0", {},
     both(setting(format="pack-quantized"), regroup(8, "dynamic", None)), {"transformers"}),
    ("activations-dropped", "group_0", {}, regroup(8, "dynamic", "pack-quantized"),
     {"vllm", "vllm-ascend", "sglang"}),
    ("asymmetric-packed", "group_0", PACKED, regroup(8, None, "pack-quantized", symmetric=False),
     {"transformers"}),
    ("split-fused", f"{LAYER}.mlp.gate_up_proj", {}, setting(ignore=["lm_head", GATE]),
     {"vllm", "vllm-ascend", "sglang"}),
    ("split-fused", f"{LAYER}.self_attn.qkv_proj", {}, setting(config_groups={
        "one": {**group(8, "dynamic", "int-quantized"), "targets": ["re:.*q_proj"]},
        "other": group(8, "dynamic", "int-quantized")}), {"vllm", "vllm-ascend", "sglang"}),
    ("mixed-precision", "config.json", {}, setting(format="mixed-precision"), NOTE),
    ("missing-part", f"{DOWN}.weight_scale", {}, drop(f"{DOWN}.weight_scale"),
     COMPRESSED_SERVERS),
    ("missing-part", f"{DOWN}.input_scale", STATIC, drop(f"{DOWN}.input_scale"),
     COMPRESSED_SERVERS),
    ("not-a-target", f"{DOWN}.weight_scale", {}, setting(ignore=["lm_head", "re:.*down_proj"]),
     COMPRESSED_SERVERS),
    ("wrong-form", f"{DOWN}.weight", {}, store(f"{DOWN}.weight", lambda t: t.to(torch.int16)),
     COMPRESSED_SERVERS),
    ("wrong-form", f"{DOWN}.weight_scale", {}, store(f"{DOWN}.weight_scale", torch.ravel),
     COMPRESSED_SERVERS),
    ("input-scale-shape", f"{Q}.input_scale", STATIC,
     store(f"{Q}.input_scale", lambda t: t.reshape(())), {"transformers"}),
    ("bad-scale", f"{Q}.weight_scale", {}, store(f"{Q}.weight_scale", torch.zeros_like),
     COMPRESSED_SERVERS),
    ("code-range", f"{Q}.weight", {"bits": 4}, store(f"{Q}.weight", lambda t: t + 8),
     COMPRESSED_SERVERS),
]  # fmt: skip


# --- good folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds",
    [
        dict(attention="W8A8", mlp="W8A16"),
        dict(attention="W8A8", mlp="W8A8_DYNAMIC", dtype="float16"),
        dict(attention="W8A8_DYNAMIC", mlp="W8A8_DYNAMIC"),
        dict(attention="W8A16", mlp="W8A16"),
    ],
)
def test_a_good_ascend_folder_is_taken(kinds: dict[str, str], tmp_path: Path) -> None:
    report = check_folder(ascend(**kinds).write(tmp_path / "good"))
    has_w8a16 = "W8A16" in kinds.values()
    found = {(f.rule, f.breaks) for f in report.findings if f.rule != "w8a16-bias"}
    assert found == ({("no-kernel", ("sglang",))} if has_w8a16 else set())
    assert report.servers == {
        "vllm-ascend": "takes",
        "mindie": "takes",
        "sglang": "refuses" if has_w8a16 else "takes",
        "vllm": "does not read this format",
        "transformers": "does not read this format",
    }
    assert report.refused_by() == has_w8a16 and report.refused_by("vllm")


def test_who_takes_w4a8_depends_on_the_release(tmp_path: Path) -> None:
    folder = ascend("W4A8_DYNAMIC", "W4A8_DYNAMIC").write(tmp_path / "good")
    report = check_folder(folder)
    assert {f.rule for f in report.findings} == {"no-kernel", "computes-otherwise"}
    assert [report.servers[name] for name in ("mindie", "vllm-ascend", "sglang")] == [
        "takes", "takes", "refuses",
    ]  # fmt: skip
    assert check_folder(folder, "vllm-ascend==main").servers["vllm-ascend"] == "refuses"
    with pytest.raises(InputError, match=r"what vllm-ascend 0\.1 takes"):
        check_folder(folder, "vllm-ascend==0.1")
    assert report.types == {"FLOAT": 5, "W4A8_DYNAMIC": 7}


@pytest.mark.parametrize(
    ("bits", "activation", "taking"),
    [
        (8, "dynamic", COMPRESSED_SERVERS),
        (8, "static", COMPRESSED_SERVERS - {"sglang"}),
        (8, None, {"transformers", "vllm"}),
        (4, None, {"transformers", "vllm"}),
        (4, "dynamic", {"transformers"}),
    ],
)
def test_a_good_compressed_tensors_folder(
    bits: int, activation: str | None, taking: set[str], tmp_path: Path
) -> None:
    report = check_folder(compressed(bits, activation).write(tmp_path / "good"))
    assert {s for s, verdict in report.servers.items() if verdict == "takes"} == taking
    assert report.servers["mindie"] == "does not read this format"
    assert report.types == {"group_0": 7}


def test_a_tied_head_may_be_described_and_not_stored(tmp_path: Path) -> None:
    draft = ascend("W8A8", "W8A8_DYNAMIC")
    both(configure(tie_word_embeddings=True), drop("lm_head.weight"))(draft)
    assert check_folder(draft.write(tmp_path / "tied")).findings == ()


def test_a_model_that_nobody_knows_is_still_checked(tmp_path: Path) -> None:
    draft = ascend("W8A8", "W8A8_DYNAMIC")
    both(configure(model_type="mine"), drop(f"{Q}.deq_scale"))(draft)
    rules = {f.rule for f in check_folder(draft.write(tmp_path / "mine")).findings}
    assert rules == {"unknown-model", "described-missing", "missing-part"}


# --- broken folders -----------------------------------------------------------------------------


def fires(draft: Draft, path: Path, rule: str, tensor: str, breaks: set[str]) -> None:
    report = check_folder(draft.write(path))
    found = [f for f in report.findings if f.rule == rule]
    assert found, f"{rule} did not fire: {report.render()}"
    assert any(tensor in f.tensor for f in found), found
    assert {server for f in found for server in f.breaks} == breaks
    for server in breaks:
        assert report.servers[server] == "refuses" and report.refused_by(server)
        assert rule in report.render(server)


@pytest.mark.parametrize(("rule", "tensor", "change", "breaks"), FILES)
def test_a_broken_file_is_found(
    rule: str, tensor: str, change: Change, breaks: set[str], tmp_path: Path
) -> None:
    draft = compressed()
    change(draft)
    expected = "" if rule == "damaged-file" else tensor
    fires(draft, tmp_path / "broken", rule, expected, breaks)


def test_tensors_in_two_files_are_found(tmp_path: Path) -> None:
    draft = compressed()
    folder = draft.write(tmp_path / "broken")
    left_over = compressed()
    left_over.stem = "leftover"
    left_over.write(tmp_path / "other")
    (tmp_path / "other" / "leftover.safetensors").rename(folder / "leftover.safetensors")
    report = check_folder(folder)
    assert "duplicate-tensor" in {f.rule for f in report.findings}
    assert report.refused_by("vllm")


@pytest.mark.parametrize(("rule", "tensor", "kinds", "change", "breaks"), BROKEN_ASCEND)
def test_a_broken_ascend_folder_is_found(
    rule: str, tensor: str, kinds: dict[str, str], change: Change, breaks: set[str], tmp_path: Path
) -> None:
    draft = ascend(**kinds)
    change(draft)
    fires(draft, tmp_path / "broken", rule, tensor, breaks)


@pytest.mark.parametrize(("rule", "tensor", "kinds", "change", "breaks"), BROKEN_COMPRESSED)
def test_a_broken_compressed_tensors_folder_is_found(
    rule: str, tensor: str, kinds: dict[str, Any], change: Change, breaks: set[str], tmp_path: Path
) -> None:
    draft = compressed(**kinds)
    change(draft)
    fires(draft, tmp_path / "broken", rule, tensor, breaks)


def test_every_rule_has_a_broken_folder() -> None:
    # the names are broken in tests/formats/checkpoint/test_hub_names.py
    files = {entry[0] for entry in FILES}
    files |= {"duplicate-tensor", "missing-config", "names-in-memory"}
    assert files == {rule.name for rule in FILE_RULES}
    ascend_rules = {entry[0] for entry in BROKEN_ASCEND} - {"missing-config"}
    ascend_rules |= {"mixed-expert-types"}
    assert ascend_rules == {rule.name for rule in ASCEND_RULES}
    assert {*(entry[0] for entry in BROKEN_COMPRESSED), "ignored-in-memory"} == {
        rule.name for rule in COMPRESSED_TENSORS_RULES
    }
    for rules in RULES.values():
        assert len({rule.name for rule in rules}) == len(rules)


@pytest.mark.parametrize(
    "changed",
    [
        {"ignore": 7}, {"config_groups": {"g": {"weights": {"num_bits": "x"}, "targets": 3}}},
        {"config_groups": {"g": {"weights": {"num_bits": 8}, "targets": True}}},
    ],
)  # fmt: skip
def test_a_quantization_config_of_another_form_is_a_finding(changed: Any, tmp_path: Path) -> None:
    draft = compressed()
    setting(**changed)(draft)
    report = check_folder(draft.write(tmp_path / "odd"))
    assert report.refused_by() or "ignore" in changed


def test_a_pipe_among_the_weights_is_not_waited_for(tmp_path: Path) -> None:
    folder = compressed().write(tmp_path / "folder")
    os.mkfifo(folder / "more.safetensors")
    found = [f for f in check_folder(folder).findings if f.tensor == "more.safetensors"]
    assert any("not a regular file" in finding.message for finding in found)


# --- the command --------------------------------------------------------------------------------


def test_the_command_says_who_takes_it(tmp_path: Path, capsys: Any) -> None:
    folder = ascend("W8A8", "W8A8_DYNAMIC").write(tmp_path / "good")
    assert main(["check", str(folder)]) == 0
    assert "vllm-ascend: takes" in capsys.readouterr().out
    assert main(["check", str(folder), "--server", "transformers"]) == 1
    assert "does not read this format" in capsys.readouterr().out


def test_the_command_fails_where_a_server_refuses(tmp_path: Path, capsys: Any) -> None:
    draft = ascend("W4A8_DYNAMIC", "W4A8_DYNAMIC")
    folder = draft.write(tmp_path / "w4a8")
    assert main(["check", str(folder)]) == 1
    assert main(["check", str(folder), "--server", "mindie"]) == 0
    assert main(["check", str(folder), "--server", "vllm-ascend==main"]) == 1
    capsys.readouterr()
    assert main(["check", str(folder), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["servers"]["sglang"] == "refuses"
    assert {f["rule"] for f in data["findings"]} == {"no-kernel", "computes-otherwise"}


def test_what_is_no_folder_is_an_error(tmp_path: Path, capsys: Any) -> None:
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(StorageError, match="no such folder"):
        check_folder(tmp_path / "nowhere")


def test_an_unknown_server_is_an_error(tmp_path: Path) -> None:
    report = check_folder(ascend().write(tmp_path / "good"))
    with pytest.raises(InputError, match="unknown server"):
        report.refused_by("triton-server")
