"""`panguq explain MODEL_DIR`: a whole model on a device, and as a server runs it."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from panguq.cli.command import print_json, quiet_transformers, tokens, whole
from panguq.errors import InputError, LoweringError, RecipeError

_FLOATS = ("bf16", "bfloat16", "fp16", "float16", "none", "unquantized")
_CARDS = whole(1, 1024)


def add_options(command: argparse.ArgumentParser) -> None:
    """What only a model on a server has."""
    of_server = command.add_argument_group("a model on a server")
    of_server.add_argument(
        "--server",
        metavar="NAME[==VERSION]",
        help="predict a request there, launch path included (default: the device alone); without a "
        "version, the newest that was measured",
    )
    of_server.add_argument(
        "--mode", metavar="graph|eager", help="how the server runs the model (default: graph)"
    )
    of_server.add_argument("--new-tokens", type=tokens, help="tokens in each answer (default: 256)")
    of_server.add_argument("--tp", type=_CARDS, help="cards that divide every matmul (default: 1)")
    of_server.add_argument(
        "--ep", type=_CARDS, help="cards that divide a mixture's experts; as many as --tp"
    )
    of_server.add_argument(
        "--memory", metavar="SIZE", help="a card's memory, as in 32GiB (default: the target's)"
    )


_ONLY_SERVED = ("server", "mode", "new_tokens", "tp", "ep", "memory")


def refuse_for_shapes(options: argparse.Namespace) -> None:
    """Raises InputError for options that a shape alone has no use for."""
    for name in _ONLY_SERVED:
        if getattr(options, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} is for a model, and {options.subject} is a shape",
                "give a model folder",
            )


def find_scheme(text: str) -> Any:
    """A scheme by name, however it is spelled: w8a8_dynamic, W8A8-dynamic, bf16 for float.

    Raises RecipeError, with the nearest name, for anything else.
    """
    from panguq.ir.quant_spec import SCHEMES, parse_scheme

    if text.strip().lower() in _FLOATS:
        return SCHEMES["FLOAT"]
    try:
        return parse_scheme(text)
    except RecipeError:
        if text.strip().upper().replace("-", "_") in SCHEMES:
            return SCHEMES[text.strip().upper().replace("-", "_")]
        raise


def parse_memory(text: str) -> int:
    """Bytes of `32GiB`, `64GB` or `65536MiB`. Raises InputError for anything else."""
    import re

    units = {"GIB": 2**30, "GB": 10**9, "MIB": 2**20, "MB": 10**6}
    found = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,3})?) ?([GM]i?B)", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise InputError(f"memory {text!r:.40}: is no size of a card", "write it as in 32GiB")
    return int(float(found[1]) * units[found[2].upper()])


def write_text(path: Path, text: str) -> None:
    """The text as a file, whole or not at all."""
    from panguq.files.whole_file import output_file, write_file

    with output_file(path, LoweringError) as file:
        write_file(file, [text.encode()])


def run(options: argparse.Namespace, scheme: Any, target: Any, dtype: str) -> int:
    """Predict and print: on a server if one is named, else on the device alone."""
    quiet_transformers()
    if options.server is not None:
        return _run_served(options, scheme, target, dtype)
    for name in _ONLY_SERVED:
        if getattr(options, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} is for a model on a server, and none is named",
                "give --server, for example --server vllm-ascend",
            )
    return _run_device(options, scheme, target, dtype)


def _run_served(options: argparse.Namespace, scheme: Any, target: Any, dtype: str) -> int:
    from panguq.forecast.forecast import Request, forecast
    from panguq.forecast.graph import graph_of
    from panguq.forecast.launch_paths import find_launch_path
    from panguq.forecast.parallel import Cards
    from panguq.forecast.support import unsupported
    from panguq.forecast.text import as_json, render

    path = find_launch_path(options.server, options.mode or "graph")
    for name in ("csv", "heat_map", "allow_float", "exact"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} is not for a model on a server")
    new_tokens = options.new_tokens or 256
    card = None if options.memory is None else parse_memory(options.memory)
    request = Request(options.batch, options.prompt, new_tokens)
    gm, interface = graph_of(options.subject, scheme.name, dtype)
    found = forecast(
        gm,
        interface,
        target,
        path,
        request,
        scheme=scheme.name,
        dtype=dtype,  # type: ignore[arg-type]
        weight_format=options.weight_format or "NZ",
        cards=Cards(options.tp or 1, options.ep or 1),
        card_bytes=card,
    )
    found = dataclasses.replace(found, notes=(*unsupported(path.server, scheme), *found.notes))
    if options.json:
        print_json(as_json(found))
    else:
        print(render(found))
    return 0


def _run_device(options: argparse.Namespace, scheme: Any, target: Any, dtype: str) -> int:
    from panguq.explain.files import candidates_csv, save_heat_map
    from panguq.explain.model import explain_model
    from panguq.explain.model_text import PUBLISHED, render
    from panguq.forecast.graph import graph_of

    gm, interface = graph_of(options.subject, scheme.name, dtype)
    found = explain_model(
        gm,
        interface,
        target,
        dtype,  # type: ignore[arg-type]
        scheme.name,
        prompt=options.prompt,
        batch=options.batch,
        allow_float=options.allow_float,
        weight_format=options.weight_format or "ND",
    )
    shapes = [(row.n, row.k) for row in found.matmuls if row.scheme != "FLOAT"]
    if options.heat_map is not None:
        save_heat_map(options.heat_map, _problem(shapes, scheme, dtype), shapes, target)
    if options.csv is not None:
        parts = [_candidates(n, k, scheme, dtype, target, options) for n, k in shapes]
        texts = [candidates_csv(part.problem, part.rows) for part in parts]
        lines = [text if i == 0 else text.split("\n", 1)[1] for i, text in enumerate(texts)]
        write_text(options.csv, "".join(lines))
    if options.json:
        phases = {name: {"gain": getattr(found, name).gain} for name in ("prefill", "decode")}
        data = dataclasses.asdict(found)
        for name, extra in phases.items():
            data[name] |= extra
        print_json(data | {"published": PUBLISHED})
    else:
        print(render(found))
    return 0


def _problem(shapes: list[tuple[int, int]], scheme: Any, dtype: Any) -> Any:
    from panguq.lowering.problem import MatmulProblem

    if not shapes:
        raise LoweringError("no matmul of the model is quantized", "choose another scheme")
    return MatmulProblem(1, *shapes[0], scheme, dtype=dtype)


def _candidates(n: int, k: int, scheme: Any, dtype: Any, target: Any, options: Any) -> Any:
    from panguq.explain.matmul import explain
    from panguq.lowering.problem import MatmulProblem

    problem = MatmulProblem(options.batch, n, k, scheme, dtype=dtype)
    return explain(problem, target, allow_float=options.allow_float)
