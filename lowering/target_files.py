"""Targets as YAML or JSON files: plain data, checked number by number, never executed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from panguq.errors import LoweringError, PanguqError
from panguq.files.limits import TARGET_BYTES, read_limited
from panguq.files.plain_yaml import check_plain, dump_yaml, read_yaml
from panguq.files.strict_json import parse_json
from panguq.files.whole_file import output_file, write_file
from panguq.lowering.known_targets import first_of_kind
from panguq.lowering.measured import Measured
from panguq.lowering.problem import FLOAT_BYTES
from panguq.lowering.target import Constant, KernelCost, Target, check_target
from panguq.suggest import did_you_mean

_KEYS = ("name", "kind", "constants", "kernels", "measured")
_HINT = "save_target(find_target('ascend910b1'), path) writes a file to start from"


def load_target(path: Path, reserved: Collection[str] = ()) -> Target:
    """The target in a file that `save_target` wrote, or a person.

        name: mine
        kind: ascend
        constants:
          launch_us: {value: 13.5, unit: us, source: fitted to timings of my machine}

    `reserved` names belong to other targets. Raises LoweringError, naming the file and the
    constant, for what is missing, unknown, not a
    number, zero, negative or not finite.
    """
    data = _read(path)
    _only(data, _KEYS, str(path), "keys")
    name = data.get("name")
    if not isinstance(name, str) or not name:
        raise LoweringError(f"{path}: name: is missing or not text", _HINT)
    if name in reserved:
        raise LoweringError(
            f"{path}: name: {name!r} is a built-in target's", "give the target another name"
        )
    first = first_of_kind(data.get("kind"), str(path))
    constants = {
        key: _constant(entry, f"{path}: constants.{key}", first.units.get(key))
        for key, entry in _mapping(data.get("constants", {}), f"{path}: constants").items()
    }
    kernels = {
        key: _kernel(entry, f"{path}: kernels.{key}")
        for key, entry in _mapping(data.get("kernels", {}), f"{path}: kernels").items()
    }
    measured = tuple(
        _measured(entry, f"{path}: measured[{place}]")
        for place, entry in enumerate(_list(data.get("measured", []), f"{path}: measured"))
    )
    target = replace(first, name=name, kernels=kernels, constants=constants, measured=measured)
    return check_target(target, str(path))


def save_target(target: Target, path: Path) -> None:
    """Write the target as YAML under a temporary name, then rename it.

    Raises LoweringError if the target is not sound or the file cannot be written.
    """
    check_target(target, f"target {target.name}")
    data: dict[str, object] = {"name": target.name, "kind": target.kind}
    if target.constants:
        data["constants"] = {name: asdict(c) for name, c in target.constants.items()}
    if target.kernels:
        data["kernels"] = {name: asdict(cost) for name, cost in target.kernels.items()}
    if target.measured:
        data["measured"] = [asdict(row) for row in target.measured]
    with output_file(path, LoweringError) as file:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, [dump_yaml(data).encode()])


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".json" and path.is_file():
            data = parse_json(read_limited(path, TARGET_BYTES), str(path))
            check_plain(data, str(path))
        else:
            data = read_yaml(path)
    except PanguqError as error:
        raise LoweringError(error.message, _HINT) from None
    except OSError as error:
        raise LoweringError(f"{path}: cannot be read: {error.strerror}", _HINT) from None
    return _mapping(data, str(path))


def _mapping(data: object, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise LoweringError(f"{where}: is not a mapping", _HINT)
    return data


def _constant(entry: object, where: str, known: str | None) -> Constant:
    given = _mapping(entry, where)
    _only(given, ("value", "unit", "source"), where, "keys")
    unit = given.get("unit")
    if known is not None and unit not in (None, known):
        raise LoweringError(f"{where}.unit: {unit!r}, but this constant is in {known}")
    if "value" not in given:
        raise LoweringError(f"{where}.value: is missing", _HINT)
    source = given.get("source", "")
    return Constant(given["value"], known or str(unit), str(source))


def _kernel(entry: object, where: str) -> KernelCost:
    given = _mapping(entry, where)
    names = [f.name for f in fields(KernelCost)]
    _only(given, names, where, "keys")
    missing = [name for name in names if name not in given]
    if missing:
        raise LoweringError(f"{where}.{missing[0]}: is missing", _HINT)
    return KernelCost(**given)


def _list(data: object, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise LoweringError(f"{where}: is no list", _HINT)
    return data


def _measured(entry: object, where: str) -> Measured:
    given = _mapping(entry, where)
    names = [f.name for f in fields(Measured)]
    _only(given, names, where, "keys")
    missing = [name for name in names if name not in given]
    if missing:
        raise LoweringError(f"{where}.{missing[0]}: is missing", _HINT)
    for name in ("kernel", "scheme"):
        if not isinstance(given[name], str):
            raise LoweringError(f"{where}.{name}: is not text", _HINT)
    for name, known in (("dtype", FLOAT_BYTES), ("weight_format", ("ND", "NZ"))):
        if given[name] not in known:
            raise LoweringError(f"{where}.{name}: {given[name]!r} is none of {', '.join(known)}")
    for name in ("m", "n", "k"):
        if isinstance(given[name], bool) or not isinstance(given[name], int):
            raise LoweringError(f"{where}.{name}: {given[name]!r} is not a whole number")
    return Measured(**given)


def _only(
    given: Mapping[str, object], known: tuple[str, ...] | list[str], where: str, kind: str
) -> None:
    for key in given:
        if key not in known:
            raise LoweringError(f"{where}: unknown key {key!r}", did_you_mean(key, known, kind))
