"""Single calls of torch_npu's ops, written as text, and what each layer of the stack says of them.

A layer takes a call or refuses it. From the outside in:

- contract: panguq's own rules (`panguq.kernels.ascend.vendor.contracts.violations`);
- meta: torch_npu's Meta kernel, on fake tensors that claim to be on an NPU;
- host: torch_npu's C++ code, up to the aclnn functions that a stand-in records.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from conformance.recorder import take_record
from panguq.kernels.ascend.vendor.contracts import violations

# ScalarType numbers, which torch_npu's schemas take where they say `int? dtype`.
INT8, INT32, FLOAT16, FLOAT32, BFLOAT16, QINT8, QUINT4X2 = 1, 3, 5, 6, 15, 12, 16
SYMBOL_HINT = 24
# A Meta kernel's message about a wrong tensor may itself fail, with an AttributeError.
REFUSALS = (
    RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError,
)  # fmt: skip
SPELLING = re.compile(r"(\w+)\[([\w, ]*)\](\^T)?")


@dataclass(frozen=True)
class TensorType:
    """A tensor's dtype, sizes and strides (None: contiguous); a size may be the letter m, the
    number of tokens."""

    dtype: torch.dtype
    sizes: tuple[int | str, ...]
    strides: tuple[int, ...] | None = None

    @classmethod
    def of(cls, text: str) -> TensorType:
        """`int8[m, 4096]`; `int8[64, 32]^T` is the transpose, [32, 64], of contiguous [64, 32]."""
        match = SPELLING.fullmatch(text)
        if match is None:
            raise ValueError(f"not a tensor type: {text!r}")
        name, listed, transposed = match.groups()
        parts = [size.strip() for size in listed.split(",") if size.strip()]
        sizes = tuple(size if size == "m" else int(size) for size in parts)
        if transposed is None:
            return cls(getattr(torch, name), sizes)
        rows, columns = (int(size) for size in sizes)
        return cls(getattr(torch, name), (columns, rows), (1, columns))

    def make(self, device: str, m: int | torch.SymInt) -> Tensor:
        """An uninitialized tensor of this type."""
        sizes = [m if size == "m" else size for size in self.sizes]
        if self.strides is None:
            return torch.empty(sizes, dtype=self.dtype, device=device)
        return torch.empty_strided(sizes, self.strides, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        layout = "" if self.strides is None else f":strides{list(self.strides)}"
        return f"{str(self.dtype)[6:]}[{', '.join(map(str, self.sizes))}]{layout}"


@dataclass(frozen=True)
class Call:
    """A call of `torch.ops.npu.<op>`; tensors are given by their types, or the types' text."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def overload(self) -> OpOverload:
        """The op itself."""
        overload: OpOverload = getattr(torch.ops.npu, self.op).default
        return overload

    def with_tensors(
        self, device: str, m: int | torch.SymInt
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors in the place of their types. Text of other kinds stays."""

        def value(argument: Any) -> Any:
            if isinstance(argument, list):
                return [value(item) for item in argument]
            if isinstance(argument, str) and SPELLING.fullmatch(argument):
                argument = TensorType.of(argument)
            return argument.make(device, m) if isinstance(argument, TensorType) else argument

        args = tuple(value(argument) for argument in self.args)
        return args, {name: value(argument) for name, argument in self.kwargs.items()}

    def __str__(self) -> str:
        named = [f"{name}={argument}" for name, argument in self.kwargs.items()]
        return f"{self.op}({', '.join([*map(str, self.args), *named])})"


def call(op: str, *args: Any, **kwargs: Any) -> Call:
    """`call("npu_swiglu", "float16[m, 64]", dim=-1)`."""
    return Call(op, args, kwargs)


@dataclass(frozen=True)
class Answer:
    """What a layer said: why it refuses, or None; and the types of the results."""

    refusal: str | None
    results: tuple[str, ...] = ()


def type_of(value: Any) -> str:
    """`bfloat16[m, 64]` of a tensor with concrete or symbolic sizes."""
    sizes = ", ".join(str(size) for size in value.shape)
    return f"{str(value.dtype)[6:]}[{sizes}]"


def _answer(run: Callable[[], Any]) -> Answer:
    """The results' types of `run`, or the first line of what it raised."""
    try:
        results = run()
    except REFUSALS as error:
        return Answer(str(error).strip().split("\n")[0] or type(error).__name__)
    results = results if isinstance(results, (list, tuple)) else [results]
    return Answer(None, tuple(type_of(result) for result in results if result is not None))


def ask_contract(called: Call, m: int = SYMBOL_HINT) -> Answer:
    """panguq's contract."""
    args, kwargs = called.with_tensors("meta", m)
    broken = violations(called.overload, args, kwargs)
    return Answer("; ".join(f"{v.rule} ({v.source})" for v in broken) or None)


def ask_meta(called: Call, m: int = SYMBOL_HINT) -> Answer:
    """torch_npu's Meta kernel with a known number of tokens."""
    with quiet(), FakeTensorMode():
        args, kwargs = called.with_tensors("npu", m)
        return _answer(lambda: called.overload(*args, **kwargs))


def ask_host(called: Call, m: int = SYMBOL_HINT) -> tuple[Answer, str]:
    """torch_npu's C++ code on the pretend device, and the aclnn calls that it made."""
    args, kwargs = called.with_tensors("npu", m)
    take_record()
    answer = _answer(lambda: called.overload(*args, **kwargs))
    return answer, take_record()


def symbolic(shape_env: ShapeEnv, name: str = "m", hint: int = SYMBOL_HINT) -> torch.SymInt:
    """A size of at least 2 that torch.export would keep symbolic."""
    source = ConstantSource(name)
    symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    size = shape_env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def ask_symbolic(
    called: Call, device: str, function: Callable[..., Any] | None = None
) -> tuple[Answer, int | None]:
    """A call with m symbolic, and the number that m was fixed to, if it was.

    function: what is called instead of the op, a fake of panguq's for example.
    """
    shape_env = ShapeEnv()
    with quiet(), FakeTensorMode(shape_env=shape_env):
        m = symbolic(shape_env)
        name = str(m.node.expr)
        args, kwargs = called.with_tensors(device, m)
        answer = _answer(lambda: (function or called.overload)(*args, **kwargs))
    fixed = shape_env.replacements.get(m.node.expr)
    spelled = tuple(re.sub(rf"\b{name}\b", "m", result) for result in answer.results)
    return Answer(answer.refusal, spelled), int(fixed) if fixed is not None else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """PyTorch logs the traceback of every Meta kernel that raises; here that is expected."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
