"""A compiled language model as a folder that onnxruntime-genai loads and generates from.

    model.onnx, model.onnx.data   the lowered graph with the inputs that genai feeds
    genai_config.json             names, sizes, special tokens
    tokenizer.json …              the tokenizer's files

genai gives the mask as integers `[batch, past + seq]` and asks for the last token's logits; small
nodes in front make of that what the graph takes: a boolean mask `[batch, 1, seq, past + seq]` and
`logit_positions`. The cache is called `past_key_values.<layer>.key` and `present.<layer>.key`, as
optimum has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from panguq.artifact import LOWERED, Artifact
from panguq.errors import ExportError
from panguq.files.partial_folder import is_taken, partial_folder
from panguq.files.strict_json import json_text
from panguq.files.whole_file import write_file
from panguq.formats.checkpoint.served_files import served_files
from panguq.formats.onnx.choices import kernel_notes
from panguq.formats.onnx.files import write_onnx
from panguq.formats.onnx.model import OnnxGraph, build
from panguq.ir.interface import Interface

MODEL, CONFIG = "model.onnx", "genai_config.json"
_MASK, _POSITIONS = "attention_mask", "logit_positions"
_FULL_MASK = "attention_mask.full"


def export_genai(artifact: Artifact, path: str | Path, overwrite: bool = False) -> None:
    """Write the folder `path`, whole or not at all.

    Raises ExportError for what generates no text, or whose cache is not a key and a value of each
    layer in floats (states, int8 caches), which genai has no place for; StorageError if there is
    something at `path` (`overwrite` replaces an empty folder alone) or it cannot be written.
    """
    interface = artifact.interface
    _check(interface)
    target = Path(path).resolve()
    is_taken(target, overwrite)
    graph = artifact.graph(LOWERED)
    about = {"recipe": artifact.recipe.name, "stage": LOWERED, "target": artifact.target}
    written = {f"panguq.{key}": value for key, value in about.items()}
    model = build(graph, interface, LOWERED, kernel_notes(artifact.target), written)
    for_genai(model, interface)
    files = {CONFIG: json_text(genai_config(artifact)), **served_files(artifact)}
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(target, overwrite) as folder:
        write_onnx(model, folder / MODEL)
        for name, text in files.items():
            write_file(folder / name, [text.encode() if isinstance(text, str) else text])


def genai_config(artifact: Artifact) -> dict[str, Any]:
    """genai_config.json: what the file's inputs and outputs are called, sizes, special tokens."""
    interface, config = artifact.interface, artifact.config
    first = interface.cache[0]
    decoder = {
        "filename": MODEL,
        "head_size": first.key_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(interface.cache),
        "num_key_value_heads": first.heads,
        "session_options": {
            "provider_options": [],
            # onnxruntime would quantize the inputs of matmuls with 8-bit weights otherwise
            "session.qdq_matmulnbits_accuracy_level": "1",
        },
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": _MASK,
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    longest = interface.max_positions or getattr(config, "max_position_embeddings", None) or 2048
    model = {
        "type": "decoder",
        "context_length": longest,
        "vocab_size": interface.vocab_size,
        **_special_tokens(artifact),
        "decoder": decoder,
    }
    search = {
        "do_sample": False, "max_length": longest, "past_present_share_buffer": False,
        "num_beams": 1, "top_k": 1,
    }  # fmt: skip
    return {"model": model, "search": search}


def for_genai(graph: OnnxGraph, interface: Interface) -> None:
    """Give the model, in place, the inputs and outputs that genai feeds and reads."""
    proto = graph.model.graph
    names = {_MASK: _FULL_MASK}
    for cached in interface.cached_tensors():
        names[f"past_{cached.name}"] = f"past_key_values.{cached.layer}.{cached.part}"
        names[cached.name] = f"present.{cached.layer}.{cached.part}"
    for node in proto.node:
        _rename(node, names)
    for info in (*proto.input, *proto.output, *proto.value_info):
        info.name = names.get(info.name, info.name)
    kept = [info for info in proto.input if info.name not in (_FULL_MASK, _POSITIONS)]
    mask = helper.make_tensor_value_info(_MASK, TensorProto.INT64, ["batch", "past + seq"])
    del proto.input[:]
    proto.input.extend([kept[0], mask, *kept[1:]])
    nodes = [*_in_front(), *proto.node]
    del proto.node[:]
    proto.node.extend(nodes)


def _in_front() -> list[NodeProto]:
    """The nodes that make the graph's mask and positions of genai's mask."""
    nodes: list[NodeProto] = []

    def constant(name: str, value: Any) -> str:
        tensor = numpy_helper.from_array(numpy.array(value, dtype=numpy.int64))
        nodes.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
        return name

    def add(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    zero, one = constant("genai.0", 0), constant("genai.1", 1)
    axes = {name: constant(f"genai.axes{name}", axis) for name, axis in _AXES.items()}
    total = add("Squeeze", [add("Shape", [_MASK], "genai.total1", start=1, end=2)], "genai.total")
    new = add("Shape", ["input_ids"], "genai.seq1", start=1, end=2)
    past = add("Sub", [total, add("Squeeze", [new], "genai.seq")], "genai.past")
    rows = add("Unsqueeze", [add("Range", [past, total, one], "genai.rows1"), axes["1"]],
               "genai.rows")  # fmt: skip
    columns = add("Unsqueeze", [add("Range", [zero, total, one], "genai.columns1"), axes["0"]],
                  "genai.columns")  # fmt: skip
    causal = add("LessOrEqual", [columns, rows], "genai.causal2")
    causal = add("Unsqueeze", [causal, axes["01"]], "genai.causal")
    real = add("Cast", [_MASK], "genai.real2", to=TensorProto.BOOL)
    real = add("Unsqueeze", [real, axes["12"]], "genai.real")
    add("And", [causal, real], _FULL_MASK)
    add("Sub", [new, constant("genai.last", [1])], _POSITIONS)
    return nodes


_AXES = {"0": [0], "1": [1], "01": [0, 1], "12": [1, 2]}


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """The values that a node and its subgraphs read and give."""
    for values in (node.input, node.output):
        for index, value in enumerate(values):
            values[index] = names.get(value, value)
    for attribute in node.attribute:
        if attribute.type == attribute.GRAPH:
            inner: GraphProto = attribute.g
            for child in inner.node:
                _rename(child, names)


def _check(interface: Interface) -> None:
    if interface.kind != "causal_lm":
        raise ExportError(
            "onnxruntime-genai generates text, and this model does not", "leave out --for"
        )
    for index, layer in enumerate(interface.cache):
        if layer.states or not layer.heads or "int8" in (layer.key_dtype, layer.value_dtype):
            raise ExportError(
                f"layer {index} keeps no key and value in floats, and onnxruntime-genai knows "
                "no other cache",
                "leave out --for, or compile without quantize-kv-cache",
            )


def _special_tokens(artifact: Artifact) -> dict[str, Any]:
    """bos, eos and pad, as the generation config has them, else the model's; genai wants all."""
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for source in (artifact.generation_config, artifact.config):
            value = getattr(source, name, None)
            if value is not None:
                found[name] = value
                break
    eos = found.setdefault("eos_token_id", 0)
    first = eos[0] if isinstance(eos, list) else eos
    return {"bos_token_id": first, "pad_token_id": first, **found}
