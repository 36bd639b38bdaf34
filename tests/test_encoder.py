"""Models of transformers without a cache: how they are called, what they refuse, how they save."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import panguq
from panguq.check.report import check_folder
from panguq.cli import main
from panguq.data.calibration import encoder_batches
from panguq.data.calibration_data import read_calibration
from panguq.errors import InputError, TraceError
from panguq.evaluation import logits_of
from tests.families.encoder_sweep import check_encoder, inputs_of, loads_alike
from tests.families.encoders import make_encoder

IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 4], [9, 8, 7, 6, 5, 4, 3]])


@pytest.fixture(scope="module")
def bert():
    return make_encoder("BertForSequenceClassification")


@pytest.fixture(scope="module")
def compiled(bert):
    return panguq.compile(bert, "w8a8", calibration=[IDS, IDS.flip(1)])


def test_it_is_called_as_the_model_is(bert, compiled) -> None:
    mask = torch.ones_like(IDS)
    mask[0, -2:] = 0
    by_place, by_name = compiled(IDS, mask), compiled(input_ids=IDS, attention_mask=mask)
    assert isinstance(by_place, transformers.modeling_outputs.SequenceClassifierOutput)
    assert torch.equal(by_place.logits, by_name.logits)
    assert not torch.equal(by_place.logits, compiled(IDS).logits)
    assert torch.equal(compiled(IDS, labels=None, return_dict=False)[0], compiled(IDS).logits)
    assert compiled.config.num_labels == 3


def test_the_head_stays_float(compiled) -> None:
    schemes = {m.name: m.scheme for m in compiled.report.matmuls}
    assert schemes.pop("classifier:linear") == "FLOAT"
    assert set(schemes.values()) == {"W8A8"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(input_ids=IDS, inputs_embeds=torch.ones(1)), "does not take inputs_embeds"),
        (dict(attention_mask=torch.ones(2, 7)), "input_ids is missing"),
        (dict(input_ids=IDS, attention_mask=torch.ones(2, 6)), r"\[2, 6\], expected \[2, 7\]"),
        (dict(input_ids=IDS.repeat(1, 20)), "140 tokens are more than the model's 96 positions"),
        (dict(input_ids=IDS + 1000), r"token ids lie in \[1003, 1009\]"),
        (dict(input_ids=IDS, output_attentions=True), "does not take output_attentions"),
    ],
)  # fmt: skip
def test_what_the_graph_does_not_take(compiled, given, said) -> None:
    with pytest.raises(InputError, match=said):
        compiled(**given)


def test_what_is_saved_comes_back(bert, compiled) -> None:
    loads_alike(bert, compiled)


def test_it_does_not_generate(compiled) -> None:
    with pytest.raises(InputError, match="has no cache, so it does not generate"):
        compiled.generate(IDS)


def test_data_must_be_given() -> None:
    text, image = make_encoder("BertModel"), make_encoder("ViTModel")
    with pytest.raises(InputError, match="BertModel writes none of its own") as caught:
        panguq.compile(text, "w8a8")
    assert "texts with a tokenizer, or token ids" in caught.value.hint
    with pytest.raises(InputError, match="ViTModel writes none of its own") as caught:
        panguq.compile(image, "w8a8")
    assert "mappings with pixel_values" in caught.value.hint
    assert "random inputs" in str(panguq.compile(text, "float").report.calibration)


@pytest.mark.parametrize(
    "form",
    [
        lambda ids, types, mask: [dict(input_ids=ids, token_type_ids=types, attention_mask=mask)],
        lambda ids, types, mask: [
            dict(input_ids=i.tolist(), token_type_ids=t.tolist(), attention_mask=m.tolist())
            for i, t, m in zip(ids, types, mask, strict=True)
        ],
        lambda ids, types, mask: dict(
            input_ids=ids.tolist(), token_type_ids=types.tolist(), attention_mask=mask.tolist()
        ),
    ],
    ids=["a batch", "rows", "columns"],
)
def test_token_types_are_calibrated_on(compiled, form) -> None:
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1]])
    mask = torch.ones_like(types)
    mask[0, 5:] = mask[1, 0] = 0
    data = read_calibration(form(IDS, types, mask))
    first, second = encoder_batches(data, compiled.interface)
    assert first["input_ids"].tolist() == [IDS[0, :5].tolist()]
    assert first["token_type_ids"].tolist() == [[0, 0, 0, 0, 1]]
    assert second["token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 1]]


def test_token_types_of_another_shape_are_refused() -> None:
    for types in (torch.zeros(2, 3, dtype=torch.long), IDS / 2, [[0, 1], [0]]):
        with pytest.raises(InputError, match="calibration item 0: token_type_ids"):
            read_calibration([dict(input_ids=IDS, token_type_ids=types)])


def test_floats_of_any_width_are_taken() -> None:
    model = make_encoder("CLIPVisionModelWithProjection").to(torch.bfloat16)
    images = inputs_of(model, 0)["pixel_values"].float()
    compiled = panguq.compile(model, "w8a8-dynamic", calibration=[{"pixel_values": images}])
    with torch.no_grad():
        expected = model(images.bfloat16()).image_embeds.float()
    noise = (compiled(images.double()).image_embeds.float() - expected).norm() / expected.norm()
    assert noise < 0.1


@pytest.mark.parametrize("recipe", ["float", "w4a16"])
def test_a_bidirectional_decoder_is_never_computed_as_causal(recipe) -> None:
    """Its first token sees the last one."""
    model = make_encoder("Qwen2ForCausalLM")
    compiled = panguq.compile(model, recipe, calibration=[IDS])
    changed = IDS.clone()
    changed[:, -1] += 1
    assert (compiled(IDS).logits[:, 0] - compiled(changed).logits[:, 0]).abs().max() > 0.01
    with pytest.raises(InputError, match="does not generate"):
        compiled.generate(IDS)


def test_an_encoder_decoder_model_is_refused() -> None:
    sizes = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    for kind in (transformers.T5Model, transformers.T5ForConditionalGeneration):
        model = kind(transformers.T5Config(**sizes))
        with pytest.raises(TraceError, match="is an encoder-decoder model") as caught:
            panguq.compile(model, "float")
        assert "model.get_encoder()" in caught.value.hint
    check_encoder(model.get_encoder().eval(), panguq.compile(model.get_encoder(), "float"))


def test_inputs_of_another_kind_are_given_as_examples() -> None:
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.ASTConfig(**sizes, max_length=32, num_mel_bins=16, patch_size=8)
    model = transformers.ASTModel(config).eval()
    with pytest.raises(InputError, match="ASTModel takes input_values, of no size that is known"):
        panguq.compile(model, "float")
    sound = torch.randn(2, 32, 16)
    compiled = panguq.compile(model, "w8a8", example_inputs={"input_values": sound})
    with torch.no_grad():
        expected = model(sound).pooler_output
    assert (compiled(sound).pooler_output - expected).norm() / expected.norm() < 0.05


@pytest.fixture(scope="module")
def folder(bert, tmp_path_factory):
    place = tmp_path_factory.mktemp("folders") / "bert"
    bert.save_pretrained(place)
    return place


def test_a_folder_s_architectures_say_what_it_is(bert, folder) -> None:
    loaded = panguq.load_pretrained(folder)
    assert type(loaded) is type(bert)
    plan = panguq.plan(folder, "w8a8")
    assert [row.scheme for row in plan.matmuls if row.gives_logits] == ["FLOAT"]
    assert not plan.refusals
    (refusal,) = panguq.plan(folder, "w8a8", calibrated=False).refusals
    assert "BertForSequenceClassification writes none of its own" in refusal


def test_checkpoints_hold_the_head_in_float(compiled, tmp_path) -> None:
    compiled.save(tmp_path / "served", format="compressed-tensors")
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["quantization_config"]["ignore"] == ["classifier"]
    report = check_folder(tmp_path / "served")
    assert not report.refused_by("vllm")
    assert not any("classifier" in finding.tensor for finding in report.findings)


def test_the_command_line_says_what_it_cannot_do(bert, compiled, folder, tmp_path, capsys) -> None:
    compile_it = ["compile", str(folder), "--recipe", "w8a8"]
    for arguments in (compile_it, [*compile_it, "--dry-run"]):
        assert main(arguments) == 1
        assert "BertForSequenceClassification writes none of its own" in "".join(
            capsys.readouterr()
        )
    compiled.save(tmp_path / "saved")
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 99)
    saved = str(tmp_path / "saved")
    assert main(["generate", saved, "--prompt", "a"]) == 1
    assert "does not generate" in capsys.readouterr().err
    assert main(["eval", saved, "--against", str(folder), "--text", str(text)]) == 1
    assert "no model that continues text" in capsys.readouterr().err
    with pytest.raises(InputError, match="which this one does not"):
        logits_of(compiled)
