"""Saved folders whose graph was changed and signed again: refused, or run, and nothing worse.

Such a graph may fail when it runs, as a wrong program does; it may not crash, hang or take memory.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import panguq
from fuzz.compiles import make_model
from fuzz.kind import Case, Kind
from panguq.errors import PanguqError
from panguq.files.manifest import MANIFEST, manifest_text
from panguq.ir.ops.opset import allowed_ops

GRAPH = "graph.lowered.json"
_INTS = (-(2**63), -1, 0, 1, 2, 3, 7, 64, 10**6, 2**31, 2**40, 2**62)
_JUNK = (None, True, 1e308, "x", -1.5, [], {"node": 3}, {"dtype": "int8"}, {"tuple": [1, 2]})


def _walked(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list):
        return [_walked(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _walked(item, change) for key, item in value.items()}
    return change(value)


def mutate(rng: random.Random, graph: dict[str, Any]) -> None:
    """Change numbers, arguments, ops, weights or junk at one or two nodes."""
    nodes = graph["nodes"]
    called = [n for n in nodes if n["op"] == "call_function"]
    for _ in range(rng.randrange(1, 3)):
        node, other = rng.choice(called), rng.choice(called)
        arguments = node.get("args", [])
        kind = rng.randrange(7)
        if kind == 0:
            node["args"] = _walked(arguments, lambda v: rng.choice(_INTS)
                                   if type(v) is int and rng.random() < 0.6 else v)  # fmt: skip
        elif kind == 1 and arguments and other.get("args"):
            arguments[rng.randrange(len(arguments))] = copy.deepcopy(rng.choice(other["args"]))
        elif kind == 2:
            node["target"] = other["target"]
        elif kind == 3:
            node["target"] = rng.choice(allowed_ops())
        elif kind == 4:
            node["args"] = arguments[:-1] if rng.random() < 0.5 else [*arguments, rng.choice(_INTS)]
        elif kind == 5:
            weights = [n for n in nodes if n["op"] == "get_attr"]
            one, two = rng.choice(weights), rng.choice(weights)
            one["target"], one["type"] = two["target"], two["type"]
        else:
            node["args"] = _walked(arguments, lambda v: rng.choice(_JUNK)
                                   if rng.random() < 0.2 else v)  # fmt: skip


def _prepare(folder: Path) -> Case:
    source, changed = folder / "source", folder / "changed"
    ids = torch.randint(1, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    panguq.compile(make_model(), "w4a16", calibration=ids).save(source)
    graph = json.loads((source / GRAPH).read_text("utf-8"))
    manifest = json.loads((source / MANIFEST).read_text("utf-8"))

    def case(rng: random.Random) -> str:
        mutated, signed = copy.deepcopy(graph), copy.deepcopy(manifest)
        mutate(rng, mutated)
        text = json.dumps(mutated).encode()
        signed["files"][GRAPH] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(source, changed, copy_function=os.link)
        for name, content in ((GRAPH, text), (MANIFEST, manifest_text(signed))):
            (changed / name).unlink()
            (changed / name).write_bytes(content)
        compiled = panguq.load(changed)
        try:
            compiled(ids)
        except PanguqError:
            raise
        except Exception:
            return "loaded, fails when it runs"
        return "loaded, runs"

    return case


KIND = Kind("graphs", "saved graphs, changed and signed again", _prepare)
