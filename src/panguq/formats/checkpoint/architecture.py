"""A graph's weights as the source's architecture has them: what it has no place for is refused."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, fx, nn

from panguq.errors import ExportError
from panguq.formats.checkpoint.linear import LinearForm, QuantizedLinear
from panguq.ir.edit import get_tensor, module_path


def check_modules(skeleton: nn.Module, linears: Iterable[LinearForm]) -> None:
    """Raises ExportError for a linear that the architecture has not as `torch.nn.Linear`.

    `skeleton` is the source's architecture, with or without weights.
    """
    modules = dict(skeleton.named_modules())
    for linear in linears:
        module = modules.get(linear.path)
        if not isinstance(module, nn.Linear):
            raise ExportError(
                f"{linear.path} is a {type(module).__name__}, and loaders take quantized weights "
                "for torch.nn.Linear alone",
                "save in panguq's own format, or take an architecture with linears",
            )
        shape = (module.out_features, module.in_features)
        if shape != linear.shape or (module.bias is not None) != linear.has_bias:
            raise ExportError(
                f"{linear.path} is {list(linear.shape)} with{'out' * (not linear.has_bias)} a "
                f"bias, the architecture's is {list(shape)} with{'out' * (module.bias is None)}",
                "a pass changed the module's form, which a checkpoint cannot express",
            )


def float_weights(
    gm: fx.GraphModule, skeleton: nn.Module, quantized: Mapping[str, Sequence[QuantizedLinear]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor that is not a quantized linear's, by the source's names."""
    expected = skeleton.state_dict(keep_vars=True)
    taken = {f"{path}.{leaf}" for path in quantized for leaf in ("weight", "bias")}
    taken |= {*quantized, *(f"{path}_bias" for path in quantized)}  # where experts are stacked
    wanted = {name: tensor for name, tensor in expected.items() if name not in taken}
    found = _by_source_name(gm, skeleton, wanted, itertools.chain(*quantized.values()))
    _name_tied(found, wanted)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ExportError(
            f"the graph does not read {listed_names(missing)}, which the architecture has",
            "a checkpoint without them cannot be loaded; save in panguq's own format",
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ExportError(
                f"{name} is {list(tensor.shape)}, the architecture's is {list(wanted[name].shape)}",
                "a pass changed the module's form, which a checkpoint cannot express",
            )
    return _without_tied(found, wanted)


def _name_tied(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Give a tensor that the graph reads the names, too, that the architecture ties to its name."""
    known = {id(expected[name]): tensor for name, tensor in found.items()}
    for name, parameter in expected.items():
        if name not in found and id(parameter) in known:
            found[name] = known[id(parameter)]


def _by_source_name(
    gm: fx.GraphModule,
    skeleton: nn.Module,
    names: Iterable[str],
    linears: Iterable[QuantizedLinear],
) -> dict[str, Tensor]:
    """A weight is called as the module that reads it: a tied one has one name in the graph."""
    wanted, computed = set(names), {name for name, _ in skeleton.named_buffers()}
    known = {id(t) for q in linears for t in vars(q).values() if isinstance(t, Tensor)}
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        name, tensor = str(node.target), get_tensor(gm, str(node.target))
        leaf = name.rpartition(".")[2]
        readers = {f"{module_path(user)}.{leaf}".lstrip(".") for user in node.users}
        matching = {*readers, name} & wanted if readers & wanted else {name} & wanted
        found |= dict.fromkeys(matching, tensor)
        is_constant = not tensor.is_floating_point() or tensor.numel() <= 1 or name in computed
        if not matching and id(tensor) not in known and not is_constant:
            unknown.append(name)
    if unknown:
        raise ExportError(
            f"the architecture has no place for {listed_names(unknown)}",
            "compile without the pass that added them",
        )
    return found


def _without_tied(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One name for each tensor where the architecture ties several, if they still are one; and
    the other names, with that one."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in expected.items():
        names[id(parameter)].append(name)
    weights: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for first, *others in names.values():
        one = len({_place(found[name]) for name in (first, *others)}) == 1
        tied |= dict.fromkeys(others, first) if one else {}
        weights |= {name: found[name] for name in ((first,) if one else (first, *others))}
    return weights, tied


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def listed_names(names: Iterable[str]) -> str:
    """Up to four names as text, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + more
