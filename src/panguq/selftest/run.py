"""The parts of the self-test, each a list of rows. A call that fails is a row, not the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from panguq.errors import PanguqError
from panguq.ir.quant_spec import SCHEMES
from panguq.kernels.ascend.own import dynamic_quant, w4a16, w8a8
from panguq.lowering.problem import Candidate, MatmulProblem
from panguq.lowering.target import Target
from panguq.selftest.compare import Difference, compare
from panguq.selftest.device import brought_back, plain, profile_call, time_call, to_device
from panguq.selftest.npu_calls import LEGAL

_Verdict = Literal["agrees", "differs", "failed", "not judged"]
TOKENS = 17  # of the calls that are compared: no multiple of a tile
# Shapes (n, k) of which both schedules are timed: the deep ones of bench/data/w4a16_grid.csv, where
# Split-K may gain, and two where it should not.
GRID = ((1536, 6144), (4096, 12800), (2048, 12800), (1024, 12800), (256, 16384), (4096, 4096))
GRID_TOKENS = (1, 16, 64)
GRID_SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class CallRow:
    """One call. `predicted_us` is what the target's cost says of it, if it has one."""

    part: str
    name: str
    case: str
    verdict: _Verdict
    said: str
    us: float | None = None
    timed_by: str | None = None
    predicted_us: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)


@dataclass
class Session:
    """One run: where it computes, what it is compared with, and the kernels that were timed."""

    device: torch.device
    target: Target
    judged: bool
    kernels: list[dict[str, str]]
    has_profiler: bool = True

    def row(
        self,
        part: str,
        name: str,
        case: str,
        on_device: Callable[[], Any],
        expected: Callable[[], Any],
        predicted_us: float | None = None,
        unread: frozenset[int] = frozenset(),
    ) -> CallRow:
        """Run a call there and here, compare, and time it; results `unread` are left out."""
        row = partial(CallRow, part, name, case, predicted_us=predicted_us)
        try:
            pairs = zip(brought_back(on_device()), brought_back(expected()), strict=True)
            read = [pair for place, pair in enumerate(pairs) if place not in unread]
            difference = compare(name, [a for a, _ in read], [b for _, b in read])
            timing = time_call(on_device, self._profiled if self.has_profiler else None)
        except Exception as error:  # whatever a driver raises
            return row("failed", _told(error))
        if timing is None:
            return row(self.verdict(difference), difference.said)
        self.kernels += timing.kernels
        return row(self.verdict(difference), difference.said, timing.us, timing.by)

    def _profiled(self, run: Callable[[], Any]) -> list[dict[str, str]]:
        try:
            return profile_call(run)
        except Exception:  # not there, or cannot write: it is not asked again
            self.has_profiler = False
            return []

    def verdict(self, difference: Difference) -> _Verdict:
        """What a comparison means: nothing, where the device computes nothing."""
        if not self.judged:
            return "not judged"
        return "agrees" if difference.agrees else "differs"


def _told(error: Exception) -> str:
    if isinstance(error, PanguqError):
        return plain(error.message)
    return f"{type(error).__name__}: {plain(str(error))}"


def vendor_ops(session: Session) -> Iterator[CallRow]:
    """Every op of torch_npu that panguq emits, in each layout and dtype, against its CPU body."""
    for case, (op, make) in LEGAL.items():
        torch.manual_seed(0)
        given = make(TOKENS)
        there = to_device(given, session.device)
        name = op.name().split("::")[1].split(".")[0]
        left_out = unread_results(name, given)
        yield session.row("op", name, case, _call(op, there), _call(op, given), unread=left_out)


def unread_results(op: str, given: dict[str, Any]) -> frozenset[int]:
    """Results that were not asked for: an op may leave there whatever memory holds."""
    asked = given.get("output_mask") or [True, True]
    halves = {place + 3 * part for place in (0, 1) for part in (0, 1) if not asked[place]}
    rules = {
        "npu_add_rms_norm_dynamic_quant": halves,
        "npu_add_rms_norm_quant": set() if "scales2" in given else {1},
        "npu_fused_infer_attention_score": set() if given.get("softmax_lse_flag") else {1},
        "npu_moe_gating_top_k": set() if given.get("out_flag") else {2},
        "npu_moe_init_routing_v2": (set() if given.get("expert_tokens_num_flag") else {2})
        | (set() if "scale" in given else {3}),
    }
    return frozenset(rules.get(op, ()))


def own_kernels(session: Session, quick: bool) -> Iterator[CallRow]:
    """panguq's own kernels against their bodies, and both schedules over the grid."""
    if find_spec("triton") is None:
        said = "triton-ascend is not installed, so that panguq's own kernels cannot run"
        yield CallRow("kernel", "all", "", "not judged", said)
        return
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(TOKENS, 1000, dtype=torch.float32).to(dtype)
        there = x.to(session.device)
        op = torch.ops.panguq_npu.dynamic_quant.default
        yield session.row(
            "kernel", "dynamic_quant", str(dtype)[6:], _call(op, {"x": there}), _call(op, {"x": x})
        )
    shapes = GRID[:1] if quick else GRID
    for scheme, (n, k), m in product(("W8A8_DYNAMIC", "W4A16"), shapes, GRID_TOKENS):
        torch.manual_seed(0)
        problem = MatmulProblem(m, n, k, SCHEMES[scheme], dtype="bfloat16")
        op, given = _own_call(scheme, m, n, k)
        there = to_device(given, session.device)
        for splits in GRID_SPLITS:
            best = best_tile(problem, session.target, splits)
            if best is None:
                continue
            candidate, us = best
            how = {"splits": splits, "tile": list(candidate.tile or ())}
            case = f"m={m}, n={n}, k={k}: {candidate}"
            yield session.row(
                "kernel", scheme, case, _call(op, {**there, **how}), _call(op, {**given, **how}), us
            )


def best_tile(
    problem: MatmulProblem, target: Target, splits: int
) -> tuple[Candidate, float] | None:
    """Of panguq's own kernels with so many splits, the one of the tile predicted to be fastest."""
    legal = [
        candidate
        for candidate in target.candidates(problem)
        if candidate.refusal is None and candidate.tile is not None and candidate.splits == splits
    ]
    costs = [(target.cost(candidate, problem).total_us, candidate) for candidate in legal]
    if not costs:
        return None
    us, candidate = min(costs, key=lambda pair: pair[0])
    return candidate, us


def _own_call(scheme: str, m: int, n: int, k: int) -> tuple[Any, dict[str, Any]]:
    if scheme == "W4A16":
        words = torch.randint(-(2**15), 2**15, (k, n // 4), dtype=torch.int16)
        scale = (torch.rand(-(-k // 128), n) * 0.01 + 0.001).bfloat16()
        x = torch.randn(m, k).bfloat16()
        given: dict[str, Any] = {"x": x, "weight": words, "scale": scale, "offset": None}
        return torch.ops.panguq_npu.w4a16.default, {**given, "bias": None, "group_size": 128}
    codes = [torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((m, k), (k, n))]
    scales = [torch.rand(size) * 0.001 + 0.001 for size in (n, m)]
    given = {"x": codes[0], "weight": codes[1], "scale": scales[0], "pertoken_scale": scales[1]}
    rest = {"bias": None, "output_dtype": torch.bfloat16}
    return torch.ops.panguq_npu.w8a8.default, {**given, **rest}


def tiny_model(session: Session) -> Iterator[CallRow]:
    """One tiny model of random weights through compile, to("npu"), a call and generate."""
    import panguq
    from panguq.selftest.model import NEW_TOKENS, prompt, tiny_llama

    for recipe in ("w8a8-dynamic", "w4a16"):
        tokens, row = prompt(), partial(CallRow, "model", recipe, "compile, to, generate")
        try:
            compiled = panguq.compile(
                tiny_llama(), recipe, calibration=tokens, target=session.target.name
            )
            expected = compiled(tokens)
            logits = expected[0] if isinstance(expected, tuple) else expected
            said = compiled.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
            compiled.to(session.device)
            moved = tokens.to(session.device)
            found = compiled(moved)
            there = found[0] if isinstance(found, tuple) else found
            continued = compiled.generate(moved, max_new_tokens=NEW_TOKENS, do_sample=False)
        except Exception as error:
            # What a stand-in makes of token ids may be no token ids.
            yield row("failed" if session.judged else "not judged", _told(error))
            continue
        difference = compare("npu_weight_quant_batchmatmul", [there.cpu()], [logits])
        same = int((continued.cpu() == said).sum() - tokens.numel())
        told = f"logits {difference.said}; {same} of {NEW_TOKENS} new tokens are the CPU's"
        yield row(session.verdict(difference), told)


def _call(op: Any, given: dict[str, Any]) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    return lambda: op(**given)


# Ops are registered where their modules are imported.
_REGISTERED = (dynamic_quant, w4a16, w8a8)
