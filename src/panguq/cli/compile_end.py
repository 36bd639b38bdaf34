"""What the end of `panguq compile` would refuse, refused before it begins."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from panguq.cli.compile_places import existing_parent
from panguq.errors import InputError
from panguq.server_releases import find_release
from panguq.servers import READS

logger = logging.getLogger("panguq")


def is_for_servers(server: str | None, format: str) -> bool:
    """Whether what is compiled is to be served out of a checkpoint."""
    return server is not None or any(format in read for read in READS.values())


def check_server(asked: str, out: Path | None, format: str) -> None:
    """Refuse `--for` where nothing is saved that the server could read. Raises InputError, for an
    unknown server or version, too."""
    server = find_release(asked).server
    if out is None or format not in READS[server]:
        said = "without --out" if out is None else f"with --format {format}, which it does not read"
        raise InputError(
            f"--for {server} {said}",
            f"save with --out and --format {' or '.join(READS[server])}, or add --dry-run to only "
            "hear its verdict",
        )


def check_data(options: argparse.Namespace, recipe: Any, model: Any) -> None:
    """Refuse a recipe that needs data where none is given and the model writes none of its own, and
    text for a model that reads something else. Raises InputError."""
    from panguq.data.encoder_inputs import lacks_data, needs_data
    from panguq.ir.encoder import is_encoder, reads_text
    from panguq.schedule import Schedule

    needs = Schedule.of(recipe, options.target).needs_calibration
    if options.calibration is None and needs and lacks_data(model, None):
        raise needs_data(model)
    if options.calibration is not None and is_encoder(model) and not reads_text(model):
        raise InputError(
            f"--calibration gives text, and {type(model).__name__} reads something else",
            "compile it from Python with calibration=, a list of mappings of its inputs",
        )


def check_end(options: argparse.Namespace, recipe: Any, dtype: Any, model: Any) -> None:
    """Refuse what saving the model would: no room for it, schemes that the format cannot hold,
    or that the server of `--for` has no kernel for. Raises StorageError or ExportError."""
    if options.out is None:
        return
    _check_room(options, recipe, dtype, model)
    from panguq.errors import ExportError
    from panguq.planning.format_check import check_format
    from panguq.server_verdicts import verdicts

    found, warnings = check_format(
        options.format, model, recipe, target=options.target, dtype=dtype
    )
    for warning in warnings:
        logger.warning(warning)
    if options.server is not None and found is not None:
        verdict = verdicts(found, options.server, format=options.format)
        if not verdict.takes:
            raise ExportError(verdict.render(), "choose what it names, or leave out --for")


def saving_verdict(
    options: argparse.Namespace, recipe: Any, dtype: Any, found: Any
) -> dict[str, list[str]]:
    """What `--format` would say to the model of a dry run: `refusals` and `warnings`; empty where
    it says nothing, or the dry run refuses the compile already."""
    from panguq.errors import ExportError
    from panguq.formats.registry import find_format
    from panguq.models.hf import skeleton
    from panguq.planning.format_check import check_format

    if found.refusals or find_format(options.format).linears_check() is None:
        return {}
    model = skeleton(options.model)
    try:
        _, warnings = check_format(
            options.format, model, recipe, target=options.target, dtype=dtype, planned=found
        )
    except ExportError as error:
        return {"refusals": [f"{error.message} ({error.hint})"]}
    return {"warnings": warnings} if warnings else {}


def _check_room(options: argparse.Namespace, recipe: Any, dtype: Any, model: Any) -> None:
    """The result on its disk; the codes once more where the parts lie on another, or where a
    checkpoint is written, which shares none of panguq's files."""
    from panguq.planning.disk_forecast import check_disk, forecast_bytes

    codes, others = forecast_bytes(model, recipe, dtype)
    out = options.out.resolve()
    work = out if options.work_dir is None else options.work_dir.resolve()
    result, parts = existing_parent(out), existing_parent(work)
    shared = options.format == "panguq" and result.stat().st_dev == parts.stat().st_dev
    places = {result: codes + others}
    if not shared:
        places[parts] = places.get(parts, 0) + codes
    check_disk(places)
