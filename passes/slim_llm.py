"""SliM-LLM: each group of columns gets the bits that its salience is worth, at a fixed mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_field
from typing import ClassVar

import torch
from torch import Tensor, fx

from panguq.decibels import decibels
from panguq.errors import RecipeError
from panguq.ir.edit import call, erase_unused, replace, tensor_node
from panguq.ir.number_format import INT1, Integer
from panguq.ir.ops.mixed_packing import pack_mixed_codes, unpack_mixed_codes
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.views import QuantizedWeight
from panguq.passes.codes.column_solver import solve_columns
from panguq.passes.codes.gram import gram, inverse_factor, output_error
from panguq.passes.codes.solvable import check_solvable
from panguq.passes.codes.solve_weights import SolveWeights
from panguq.passes.codes.stored_codes import set_grid, stem_of
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.passes.codes.weight_scales import (
    SMALLEST_SCALE,
    check_clip_search,
    clip_ratios,
    search_scale,
)
from panguq.tensors.weight_store import WeightStore

SCALE_DTYPE = torch.bfloat16  # for every width: the scales of a weight are one tensor


@dataclass(frozen=True)
class SlimLlm(SolveWeights):
    """Before: `quantize_weight(w, scale, zero_point)`, b bits.  After: codes of b-1, b, b+1 bits.

    Source: SliM-LLM, arXiv 2405.14917; H = X^T X, damped, over the calibration inputs.
    - Bits (the paper's SBA): groups of columns are ranked by salience, sum of
      w_ij^2 / [H^-1]_jj^2. The i first get b + 1 bits and the i last b - 1, so that the mean stays
      b exactly; i grows from 0 as long as the squared output error falls by `least_gain_db` at
      every step, less being chance. The error is that of inputs that the codes have not seen: codes
      are chosen from every second batch, and judged by the others.
    - Grids (SQC): scales come from a search over clip ratios in which a weight's squared error
      counts 1 / U_jj^2, U^T U = H^-1: the loss that it leaves when later columns have made up for
      it. They are fitted group by group, as updated by the groups before.
    - Codes: GPTQ's column loop (`solve_columns`), at last for all inputs; with `act_order` groups
      come by falling mean square of their inputs, and so do the columns of a group. Storage keeps
      the weight's order.

    1 bit stands for -scale and +scale, scale the weighted mean |w|.

    The paper judges bits by rounding to nearest on the calibration inputs themselves, which
    misleads: the column loop makes up for most of a low-bit group's error there, and for less of it
    elsewhere. It compares outputs by the divergence of their softmax, which no output of a hidden
    matmul ever meets and which does not see a shift of all outputs; here it is their squared error,
    tr(dW H dW^T). It always moves at least one pair of groups; here i may be 0. The authors'
    search of the grid has an error norm of 2.4, salient weights in a sum of their own, and ratios
    of 0.9 to 1.1; by default their sums weigh alike, so that salience plays no part, and at 2 bits
    the best ratio is often below 0.9.
    """

    name: ClassVar[str] = "slim-llm"
    integers_only: ClassVar[bool] = True
    note_columns: ClassVar[tuple[str, ...]] = ("fewer_bits", "more_bits", "held_out_db", "damping")
    act_order: bool = True
    damping: float = 1.0
    smallest_ratio: float = 0.4
    steps: int = 13
    least_gain_db: float = 0.25

    def __post_init__(self) -> None:
        check_clip_search(self.name, self.smallest_ratio, self.steps)
        if self.damping < 0:
            raise RecipeError(f"slim-llm: damping {self.damping} must be 0 or more", "try 0.01")

    def check_matmuls(self, gm: fx.GraphModule) -> None:
        check_solvable(self.name, gm, self.check_spec)

    def check_spec(self, name: str, spec: QuantSpec) -> None:
        """Raises RecipeError for schemes of 1 or 8 bits, which have no neighbour on one side."""
        if not (spec.is_integer and 2 <= spec.bits <= 7):
            raise RecipeError(
                f"slim-llm gives groups one bit more or less than the scheme, and the scheme of "
                f"{name} has codes of {spec.format}",
                "take a scheme of 2 to 7 bits, such as W2A16",
            )

    def solve(self, problem: WeightProblem) -> Solution:
        """Codes int8 `[n, k]`, scales, zero points, and the bits of groups, uint8 `[groups]`.

        Raises RecipeError for schemes of 1 or 8 bits, which have no neighbour on one side.
        """
        self.check_spec(problem.names[0], problem.spec)
        chosen, held_out = (gram(part) for part in halves(problem.inputs))
        everything = self._loop(problem, chosen + held_out)
        order = everything.groups_by_salience()
        trial = self._loop(problem, chosen)
        bits, gain_db = allocate_bits(order, trial, held_out, self.least_gain_db)
        _, grid = everything.solve(bits)
        codes, scale, zero = grid.solution()
        moved = int((bits > problem.spec.bits).sum())
        notes = (moved, moved, gain_db, everything.damping)
        return Solution(codes, scale, zero, shared={"bits": bits}, notes=notes)

    def _loop(self, problem: WeightProblem, hessian: Tensor) -> MixedLoop:
        ratios = clip_ratios(self.smallest_ratio, self.steps)
        return MixedLoop(problem, hessian, self.damping, self.act_order, ratios)

    def store(
        self, gm: fx.GraphModule, store: WeightStore, node: fx.Node, solution: Solution
    ) -> None:
        """`unpack_mixed_codes(packed, bits)` in place of the codes that `node` computes.

        Where all groups kept 4 bits, the codes are stored as 4-bit kernels read them.
        """
        if bool((solution.shared["bits"] == 4).all()):
            super().store(gm, store, node, solution)
            return
        quantizer, stem = QuantizedWeight.of(node), stem_of(node)
        weight, group_size = quantizer.weight, quantizer.group_size
        set_grid(gm, node, store.put, solution.scale, solution.zero_point)
        bits = solution.shared["bits"]
        packed = pack_mixed_codes(solution.codes, bits, group_size)
        args = (
            tensor_node(node, f"{stem}_codes", store.put(packed)),
            tensor_node(node, f"{stem}_bits", store.put(bits)),
            group_size,
        )
        replace(node, call(node, unpack_mixed_codes, args, origin=node, suffix=".unpacked"))
        erase_unused([weight])


class GroupFitter:
    """Scales and zero points of single groups, at any bits.

    `spec` is the scheme's; `importance` `[k]` weighs the squared errors of columns; `ratios` are
    those of the search.
    """

    def __init__(
        self, spec: QuantSpec, group_size: int, importance: Tensor, ratios: tuple[float, ...]
    ) -> None:
        self.spec = spec
        self.group_size = group_size
        self.importance = importance.split(group_size)
        self.ratios = ratios
        self.specs = {bits: replace_field(spec, format=Integer(bits)) for bits in range(1, 9)}

    def fit(self, group: int, weight: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
        """Scale bfloat16 and zero point int8 (None if symmetric) `[n]` for `weight` `[n, size]`."""
        importance = self.importance[group]
        if bits == 1:
            scale = (weight.abs() @ importance / importance.sum()).clamp_min_(SMALLEST_SCALE)
            zero = None if self.spec.symmetric else torch.zeros(len(scale), dtype=torch.int8)
            return scale.to(SCALE_DTYPE), zero
        spec = self.specs[bits]
        scale, zero = search_scale(weight, weight.shape[1], spec, importance, self.ratios)
        return scale[:, 0].to(SCALE_DTYPE), None if zero is None else zero[:, 0]


def round_to(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Codes and values of weights `[..., n]` on the grids `[n]`; float32, the codes too."""
    step = scale.float()
    if spec.format == INT1:
        codes = torch.where(weight < 0, -1.0, 1.0)
        return codes, codes * step
    offset = 0.0 if zero_point is None else zero_point.float()
    codes = (weight / step).round_().add_(offset).clamp_(spec.quant_min, spec.quant_max)
    return codes, (codes - offset) * step


class MixedLoop:
    """The column loop of a problem under one H, for any bits of its groups."""

    def __init__(
        self,
        problem: WeightProblem,
        hessian: Tensor,
        damping: float,
        act_order: bool,
        ratios: tuple[float, ...],
    ) -> None:
        self.weight = problem.weight
        self.order = column_order(hessian.diagonal(), problem.group_size, act_order)
        inverse = inverse_factor(hessian, damping, self.order)
        self.factor, self.damping = inverse
        remaining = torch.empty(len(self.order))  # in the weight's own order
        remaining[self.order] = self.factor.diagonal().square().reciprocal().float()
        self.fitter = GroupFitter(problem.spec, problem.group_size, remaining, ratios)

    def groups_by_salience(self) -> list[int]:
        """Groups by falling sum of w_ij^2 / [H^-1]_jj^2."""
        inverse_diagonal = torch.empty(len(self.order), dtype=self.factor.dtype)
        inverse_diagonal[self.order] = self.factor.square().sum(0)
        salience = self.weight.square().sum(0).double() / inverse_diagonal.square()
        groups = salience.unflatten(0, (-1, self.fitter.group_size)).sum(1)
        return groups.argsort(descending=True, stable=True).tolist()

    def solve(self, bits: Tensor) -> tuple[Tensor, MixedGrid]:
        """The values `[n, k]` for these bits of groups, and the grid that has their codes."""
        grid = MixedGrid(self.weight.shape[0], self.fitter, bits, self.order)
        solved = solve_columns(self.weight[:, self.order], self.factor, grid)
        values = torch.empty_like(self.weight)
        values[:, self.order] = solved
        return values, grid


def halves(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Every second batch, and the others; the halves of a single batch's tokens, if it has two."""
    if len(inputs) > 1:
        return list(inputs[::2]), list(inputs[1::2])
    tokens = inputs[0].flatten(0, -2)
    half = len(tokens) // 2
    return ([tokens[:half]], [tokens[half:]]) if half else ([tokens], [tokens])


def allocate_bits(
    order: list[int], loop: MixedLoop, held_out: Tensor, least_gain_db: float
) -> tuple[Tensor, float]:
    """Bits uint8 `[groups]` whose mean is the scheme's, and their output error against uniform
    bits in dB, both under `held_out`, an H that `loop` has not seen.

    Groups are taken from both ends of `order`, pair after pair, as long as each lowers the error by
    `least_gain_db`.
    """

    def error(bits: Tensor) -> float:
        difference = loop.solve(bits)[0] - loop.weight
        return float(output_error(difference, held_out.float()).sum(dtype=torch.float64))

    bits = torch.full((len(order),), loop.fitter.spec.bits, dtype=torch.uint8)
    uniform = least = error(bits)
    for pair in range(len(order) // 2):
        moved = bits.clone()
        moved[order[pair]] += 1
        moved[order[-1 - pair]] -= 1
        found = error(moved)
        if found >= least * 10 ** (-least_gain_db / 10):
            break
        bits, least = moved, found
    return bits, decibels(max(least, 1e-30) / uniform) if uniform > 0 else 0.0


def column_order(mean_square: Tensor, group_size: int, falling: bool) -> Tensor:
    """Columns `[k]` as they are solved: whole groups and, within them, columns by mean square."""
    if not falling:
        return torch.arange(len(mean_square))
    groups = mean_square.unflatten(0, (-1, group_size))
    within = groups.argsort(dim=1, descending=True, stable=True)
    first = groups.sum(1).argsort(descending=True, stable=True)
    return (within + torch.arange(len(groups))[:, None] * group_size)[first].flatten()


class MixedGrid:
    """Rounds columns to grids whose bits differ by group, each fitted when its group comes.

    `bits` uint8 `[groups]`; `order` `[k]` is the weight's column behind each solved one, groups in
    one piece. Keeps codes int8 `[k, n]`, scales and zero points `[groups, n]`.
    """

    def __init__(self, n: int, fitter: GroupFitter, bits: Tensor, order: Tensor) -> None:
        self.unit = fitter.group_size
        self.fitter = fitter
        self.bits = bits.tolist()
        self.order = order
        self.sources = order.tolist()
        self.codes = torch.empty(len(order), n, dtype=torch.int8)
        self.scale = torch.empty(len(self.bits), n, dtype=SCALE_DTYPE)
        self.zero = None
        if not fitter.spec.symmetric:
            self.zero = torch.empty(len(self.bits), n, dtype=torch.int8)

    def begin(self, start: int, columns: Tensor) -> None:
        """Fit the grid of the group whose columns `[size, n]` come next."""
        group = self.sources[start] // self.unit
        position = self.order[start : start + self.unit] - group * self.unit
        ordered = torch.empty_like(columns).index_copy_(0, position, columns)
        scale, zero = self.fitter.fit(group, ordered.T, self.bits[group])
        self.scale[group] = scale
        if self.zero is not None and zero is not None:
            self.zero[group] = zero

    def round(self, column: int, weight: Tensor) -> Tensor:
        """The nearest value of the group's grid, whose code is kept."""
        source = self.sources[column]
        group = source // self.unit
        zero = None if self.zero is None else self.zero[group]
        spec = self.fitter.specs[self.bits[group]]
        codes, values = round_to(weight, self.scale[group], zero, spec)
        self.codes[source] = codes
        return values

    def solution(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes int8 `[n, k]`, scale and zero point `[n, groups]`."""
        zero = None if self.zero is None else self.zero.T.contiguous()
        return self.codes.T.contiguous(), self.scale.T.contiguous(), zero
