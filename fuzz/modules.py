"""Random small modules against themselves: compiled, called at other sizes, saved and loaded."""

# ruff: noqa: E501  (a block is a line of the table, however long)

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import panguq
from fuzz.compiles import sqnr_db
from fuzz.kind import Case, Fault, Kind
from panguq.errors import PanguqError

H = 32
_FLOAT_DB, _HALF_DB = 80.0, 25.0
Run = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """`run(self, x)` from `[batch, seq, H]` to the same, with parts under names."""

    def __init__(self, run: Run, **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def _linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(H, H, bias=bias)


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 6)


def _turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _attention(m: Block, x: Tensor) -> Tensor:
    b, t, h = x.shape
    q, k, v = m["qkv"](x).view(b, t, 3, 4, h // 4).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + m["out"](mixed.transpose(1, 2).reshape(b, t, h))


def _written(m: Block, x: Tensor) -> Tensor:
    y = m["l"](x)
    y += x
    y[:, 0] = y[:, 0] * 2
    y[..., :8].add_(1)
    return y.mul_(0.5).relu_()


def _picked(m: Block, x: Tensor) -> Tensor:
    y = m["l"](x)
    where = y.topk(4, -1)[1]
    hot = functional.one_hot(where, H).sum(-2).to(y.dtype)
    return y.gather(-1, y.argsort(-1)) * hot + y.flip(1).roll(3, -1)


def _complex(m: Block, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(m["l"](x).float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(pairs.real), pairs.real)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _counted(m: Block, x: Tensor) -> Tensor:
    m["count"].add_(1)
    return m["l"](x)


def _remembered(m: Block, x: Tensor) -> Tensor:
    m["count"].add_(1)
    return m["l"](x) * m["count"]


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: _linear(),
    "residual": lambda: Block(lambda m, x: x + m["l"](m["n"](x)), l=_linear(), n=nn.LayerNorm(H)),
    "mlp": lambda: Block(lambda m, x: x + m["d"](functional.silu(m["g"](m["n"](x))) * m["u"](x)),
                         d=_linear(False), g=_linear(False), u=_linear(), n=nn.RMSNorm(H, eps=1e-6)),
    "twice": lambda: Block(lambda m, x: m["l"](torch.tanh(m["l"](x))), l=_linear()),
    "tied": lambda: Block(lambda m, x: functional.linear(torch.relu(m["l"](x)), m["l"].weight.t()),
                          l=_linear(False)),
    "attention": lambda: Block(_attention, qkv=nn.Linear(H, 3 * H), out=_linear()),
    "scores": lambda: Block(lambda m, x: torch.softmax(m["q"](x) @ _turned(x) / 6, -1) @ x, q=_linear()),
    "halves": lambda: Block(lambda m, x: torch.cat([m["l"](y) for y in x.chunk(2, -1)], -1),
                            l=nn.Linear(H // 2, H // 2)),
    "uneven": lambda: Block(lambda m, x: torch.cat(m["l"](x).split([8, H - 8], -1)[::-1], -1), l=_linear()),
    "stride": lambda: Block(lambda m, x: torch.cat([x[..., 1::2], m["l"](x)[..., ::2]], -1), l=_linear()),
    "written": lambda: Block(_written, l=_linear()),
    "counted": lambda: Block(_counted, l=_linear(), count=torch.zeros(())),
    "remembered": lambda: Block(_remembered, l=_linear(), count=torch.zeros(())),
    "dropout": lambda: nn.Sequential(_linear(), nn.Dropout(0.5)),
    "scaled": lambda: Block(lambda m, x: m["l"](x * m["w"]), l=_linear(), w=torch.randn(H)),
    "batch norm": lambda: Block(lambda m, x: _turned(m["n"](_turned(m["l"](x)))), l=_linear(), n=nn.BatchNorm1d(H)),
    "group norm": lambda: Block(lambda m, x: m["l"](_turned(m["n"](_turned(x)))), l=_linear(), n=nn.GroupNorm(4, H)),
    "convolution": lambda: Block(lambda m, x: m["l"](_turned(m["c"](_turned(x)))), l=_linear(),
                                 c=nn.Conv1d(H, H, 3, padding=1)),
    "pointwise": lambda: Block(lambda m, x: _turned(m["c"](_turned(x))), c=nn.Conv1d(H, H, 1)),
    "matmul": lambda: Block(lambda m, x: x @ m["w"], w=_matrix(H, H)),
    "from left": lambda: Block(lambda m, x: _turned(m["w"] @ _turned(x)), w=_matrix(H, H)),
    "einsum": lambda: Block(lambda m, x: torch.einsum("bsh,ho->bso", x, m["w"]), w=_matrix(H, H)),
    "grouped": lambda: Block(lambda m, x: torch.einsum("btgi,gio->btgo", x.unflatten(-1, (4, -1)), m["w"]).flatten(-2),
                             w=_matrix(4, H // 4, H // 4)),
    "low rank": lambda: Block(lambda m, x: m["l"](x) + m["b"](m["a"](x)) * 2, l=_linear(), a=nn.Linear(H, 4), b=nn.Linear(4, H)),
    "made weight": lambda: Block(lambda m, x: functional.linear(x, m["w"] + m["a"] @ m["b"]), w=_matrix(H, H), a=_matrix(H, 4), b=_matrix(4, H)),
    "sliced": lambda: Block(lambda m, x: functional.linear(functional.linear(x, m["w"][:H]), m["w"][H:]), w=_matrix(2 * H, H)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(_linear()),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(_linear()),
    "recurrence": lambda: Block(lambda m, x: m["g"](x)[0], g=nn.GRU(H, H, batch_first=True)),
    "cell": lambda: Block(lambda m, x: m["c"](x[:, 0])[0][:, None] + x, c=nn.LSTMCell(H, H)),
    "multi head": lambda: Block(lambda m, x: m["a"](x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(H, 4, batch_first=True)),
    "encoder": lambda: nn.TransformerEncoderLayer(H, 4, 2 * H, batch_first=True),
    "where": lambda: Block(lambda m, x: torch.where(x > 0, m["l"](x), x.masked_fill(x < -1, 0.0)), l=_linear()),
    "experts": lambda: Block(lambda m, x: sum(m[f"e{i}"](x) * torch.softmax(m["r"](x), -1)[..., i : i + 1] for i in range(3)),
                             r=nn.Linear(H, 3), e0=_linear(), e1=_linear(), e2=_linear()),
    "padded": lambda: Block(lambda m, x: m["l"](functional.pad(x, (1, 1))), l=nn.Linear(H + 2, H)),
    "odd size": lambda: nn.Sequential(nn.Linear(H, 33), nn.ReLU(), nn.Linear(33, H)),
    "one column": lambda: nn.Sequential(nn.Linear(H, 1), nn.Tanh(), nn.Linear(1, H)),
    "no column": lambda: Block(lambda m, x: torch.cat([m["z"](x), m["l"](x)], -1), z=nn.Linear(H, 0), l=_linear()),
    "zeros": lambda: Block(lambda m, x: functional.linear(x, m["w"]) + x, w=nn.Parameter(torch.zeros(H, H))),
    "an outlier": lambda: Block(lambda m, x: m["l"](x * m["w"]), l=_linear(), w=torch.ones(H).index_fill(0, torch.tensor(5), 100.0)),
    "complex": lambda: Block(_complex, l=_linear()),
    "fourier": lambda: Block(lambda m, x: torch.fft.irfft(torch.fft.rfft(m["l"](x).float()), n=H).to(x.dtype), l=_linear()),
    "picked": lambda: Block(_picked, l=_linear()),
    "sum": lambda: Block(lambda m, x: m["l"](x).cumsum(1) / (torch.arange(x.shape[1]) + 1)[:, None], l=_linear()),
    "branch": lambda: Block(lambda m, x: m["l"](x) if x.sum() > 0 else -x, l=_linear()),
    "size branch": lambda: Block(lambda m, x: m["l"](x) if x.shape[1] > 4 else -x, l=_linear()),
    "random": lambda: Block(lambda m, x: m["l"](x) + torch.randn_like(x), l=_linear()),
    "names": lambda: Block(lambda m, x: m["größe 1"](m["graph"](m["{x}"](x))), **{n: _linear() for n in ("größe 1", "graph", "{x}")}),
    "pooled": lambda: Block(lambda m, x: m["l"](functional.avg_pool1d(_turned(x), 3, 1, 1).transpose(1, 2)), l=_linear()),
}  # fmt: skip
ENDS: dict[str, Callable[[Tensor], Any]] = {
    "pair": lambda y: (y, y.sum(-1), y.argmax(-1)), "list": lambda y: [y, y * 2],
    "mapping": lambda y: {"y": y}, "same": lambda y: (y, y), "none": lambda y: (y, None),
    "number": lambda y: (y, 3), "size": lambda y: (y, y.shape[0]), "nested": lambda y: (y, (y, {"a": y})),
}  # fmt: skip


class Whole(nn.Module):
    """Blocks in a row, and what is returned of them."""

    def __init__(
        self, blocks: list[nn.Module], end: Callable[[Tensor], Any] | None, writes: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.end, self.writes = end, writes

    def forward(self, x: Tensor) -> Any:
        if self.writes:
            x.mul_(2)
        for block in self.blocks:
            x = block(x)
        return self.end(x) if self.end else x


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _compare(wanted: list[Tensor], found: list[Tensor], least: float, what: str) -> None:
    if [tuple(t.shape) for t in wanted] != [tuple(t.shape) for t in found]:
        raise Fault(f"{what}: other shapes")
    for x, y in zip(wanted, found, strict=True):
        if x.is_floating_point() and x.isfinite().all() and not sqnr_db(x, y) > least:
            raise Fault(f"{what}: {sqnr_db(x, y):.1f} dB of the module's own result")


def _prepare(folder: Path) -> Case:
    def case(rng: random.Random) -> str:
        torch.manual_seed(rng.getrandbits(32))
        names = rng.choices(tuple(BLOCKS), k=rng.choice((1, 1, 2, 3)))
        end = ENDS[rng.choice(tuple(ENDS))] if rng.random() < 0.3 else None
        model = Whole([BLOCKS[name]() for name in names], end, rng.random() < 0.05).eval()
        dtype = rng.choice((torch.float32,) * 4 + (torch.float64, torch.bfloat16))
        target = rng.choice(("cpu", "cpu", "ascend910b1"))
        recipe = rng.choice(("float", "float", "w8a8", "w8a8-dynamic", "w4a16-gptq", "w4a16"))
        model = model.to(dtype)
        batch, seq = rng.choice(((3, 5), (2, 7), (4, 6)))

        def given(batch: int, seq: int) -> Tensor:
            wide = torch.randn(batch, seq, 2 * H)[..., :: rng.choice((1, 2))][..., :H]
            return wide.to(dtype)

        made_for = torch.bfloat16 if target != "cpu" else dtype

        def called(run: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return [t.clone() for t in _tensors(run(x.clone()))]

        example = given(batch, seq)
        before, kept = copy.deepcopy(model.state_dict()), example.clone()
        compiled = panguq.compile(model, recipe, example_inputs=(example,), target=target)
        if not torch.equal(kept, example) or any(
            not torch.equal(before[name], value) for name, value in model.state_dict().items()
        ):
            raise Fault("compile changes the module or its example")
        wide = recipe == "float" and target == "cpu" and dtype != torch.bfloat16
        least = _FLOAT_DB if wide else _HALF_DB if recipe == "float" else -20.0
        for sizes in ((batch, seq), (5, 9), (1, 1), (0, 3)):
            x = example if sizes == (batch, seq) else given(*sizes)
            try:
                wanted = called(copy.deepcopy(model), x)
            except Exception:
                continue  # the module does not take these sizes
            try:
                _compare(
                    wanted, called(compiled, x), least, f"{recipe}, {target}, {names}, {sizes}"
                )
            except PanguqError:
                if sizes == (batch, seq):
                    raise
        if rng.random() < 0.4:
            shutil.rmtree(folder / "saved", ignore_errors=True)
            compiled.save(folder / "saved")
            loaded = panguq.load(folder / "saved")
            given_again = example.to(made_for)
            pairs = zip(called(compiled, given_again), called(loaded, given_again), strict=True)
            for mine, other in pairs:
                # In float64 MKL's last bit depends on where in memory a weight lies.
                if mine.dtype != torch.float64 and not torch.equal(
                    mine.nan_to_num(), other.nan_to_num()
                ):
                    raise Fault(f"{names}: loaded with other bits")
        return "compiled"

    return case


KIND = Kind("modules", "random modules, compiled and called", _prepare, seconds=120)
