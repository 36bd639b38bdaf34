"""What torch expects of a module, for one whose weights are those of compiled graphs.

The weights are listed, saved, loaded and copied under the names that they have in the graphs. Calls
that would train them, change their dtype or pickle them are refused in one sentence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, fx, nn

from panguq.artifact import Place, place_of, shared_weights
from panguq.errors import InputError, PanguqError
from panguq.ir.edit import clone, set_tensor, weights_of

_FROZEN = "train, convert or move the source model, then compile it"


def with_weights(
    stages: Mapping[str, fx.GraphModule], weights: Mapping[str, Tensor]
) -> dict[str, fx.GraphModule]:
    """Copies of the graphs that read these tensors where they have a weight of that name."""
    copies = {stage: clone(graph) for stage, graph in stages.items()}
    for graph in copies.values():
        for name in weights_of(graph):
            if name in weights:
                set_tensor(graph, name, weights[name])
    return copies


class FrozenModule(nn.Module):
    """A module that runs `stages`, graphs by name; their weights are its parameters, frozen.

    Codes and scales are parameters like float weights: `parameters()` lists what is stored. A
    subclass says with `_copied` how it is made anew.
    """

    stages: dict[str, fx.GraphModule]

    def __init__(self, stages: Mapping[str, fx.GraphModule]) -> None:
        super().__init__()
        self.training = False
        self._use(dict(stages))

    def _use(self, stages: dict[str, fx.GraphModule]) -> None:
        """Run these graphs from now on, and list their weights."""
        self.stages = stages
        self._parameters.clear()
        tied: dict[Place, nn.Parameter] = {}
        for name, tensor in shared_weights(stages).items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            self._parameters[name] = tied.setdefault(place_of(tensor), parameter)

    def _copied(self, stages: dict[str, fx.GraphModule], memo: dict[int, Any]) -> Self:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A model of its own, weights included."""
        weights = copy.deepcopy(shared_weights(self.stages), memo)
        memo[id(self)] = made = self._copied(with_weights(self.stages, weights), memo)
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled, which copy, torch.save and new processes would do."""
        raise PanguqError(
            f"a {type(self).__name__} is not pickled: a pickle is code, and runs when it is read",
            "write it with compiled.save(folder) and read it with panguq.load(folder), also in "
            "another process; torch.save(compiled.state_dict(), file) writes the weights alone",
        )

    def __getattr__(self, name: str) -> Any:
        """What torch's modules look up; of a part of the source model, where its weights are."""
        if any(weight.startswith(f"{name}.") for weight in self.__dict__.get("_parameters", ())):
            raise AttributeError(
                f"a {type(self).__name__} has no submodule {name!r}: it runs one graph, and its "
                "weights are in dict(named_parameters())"
            )
        return super().__getattr__(name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take weights of the very names, shapes and dtypes that the graphs have, or none.

        They are copied, and replace the old ones: a model that shares those keeps them.
        """
        given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        own = self._parameters
        missing_keys += [prefix + name for name in own if name not in given]
        unexpected_keys += [prefix + name for name in given if name not in own]
        known = {name: given[name] for name in own if name in given}
        wrong = {name: _mismatch(own[name], tensor) for name, tensor in known.items()}
        wrong = {name: message for name, message in wrong.items() if message}
        error_msgs += [f"{prefix}{name}: {message}" for name, message in wrong.items()]
        if known and not wrong:
            copies: dict[tuple[int, Place], Tensor] = {}  # what was tied stays tied
            for name, tensor in known.items():
                place = (id(own[name]), place_of(tensor))
                known[name] = copies.setdefault(place, tensor.detach().to("cpu", copy=True))
            self._use(with_weights(self.stages, known))

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode. Raises InputError if asked to train."""
        if mode:
            raise InputError("a compiled model is not trained", _FROZEN)
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Stay frozen. Raises InputError if asked for gradients."""
        if requires_grad:
            raise InputError("a compiled model's weights have no gradients", _FROZEN)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
        raise InputError("a compiled model's weights are not converted one by one", _FROZEN)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A subclass says where and in which dtype it runs."""
        raise NotImplementedError

    def type(self, dst_type: Any) -> Self:
        """This model, if it has that dtype. Raises InputError otherwise."""
        return self.to(dst_type)

    def half(self) -> Self:
        """This model, if it computes in float16. Raises InputError otherwise."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """This model, if it computes in bfloat16. Raises InputError otherwise."""
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        """This model, if it computes in float32. Raises InputError otherwise."""
        return self.to(torch.float32)

    def double(self) -> Self:
        """This model, if it computes in float64. Raises InputError otherwise."""
        return self.to(torch.float64)

    def cpu(self) -> Self:
        """This model, to be run on the CPU from now on."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Raises InputError: compiled models do not run there."""
        return self.to("cuda")

    def npu(self, device: int | torch.device | None = None) -> Self:
        """This model, to be run on the NPU from now on."""
        place = "npu" if device is None else f"npu:{device}" if isinstance(device, int) else device
        return self.to(place)


def _mismatch(own: Tensor | None, given: Any) -> str:
    """Why `given` cannot take the place of `own`; empty if it can."""
    assert own is not None
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__} where the model has a tensor"
    found, wanted = (f"{list(t.shape)} {t.dtype}" for t in (given, own))
    return "" if found == wanted else f"a tensor {found} where the model has {wanted}"


def asked_of_to(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str | torch.device | None, torch.dtype | None]:
    """Device and dtype among the arguments of a call of `to`."""
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    for given in (*args, *kwargs.values()):
        if isinstance(given, Tensor):
            device, dtype = given.device, given.dtype
        elif isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, (str, torch.device)):
            device = given
        elif isinstance(given, int) and not isinstance(given, bool):
            device = f"cuda:{given}"  # what torch means by a number
    return device, dtype
