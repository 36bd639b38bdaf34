"""BiLLM: binarized weights, with two magnitudes for each kind of column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from panguq.errors import RecipeError
from panguq.ir.edit import call, replace, tensor_node
from panguq.ir.number_format import INT1
from panguq.ir.ops.binary import MAGNITUDES_PER_BLOCK, dequantize_binary
from panguq.ir.ops.packing import pack_codes, packed_columns, unpack_codes
from panguq.ir.quant_spec import QuantSpec
from panguq.ir.views import QuantizedWeight
from panguq.passes.codes.column_solver import solve_columns
from panguq.passes.codes.gram import gram, inverse_factor
from panguq.passes.codes.solvable import check_solvable
from panguq.passes.codes.solve_weights import SolveWeights
from panguq.passes.codes.stored_codes import stem_of
from panguq.passes.codes.weight_problem import Solution, WeightProblem
from panguq.tensors.weight_store import WeightStore

CODE_BITS = 2  # a sign, and which of two magnitudes


@dataclass(frozen=True)
class BiLlm(SolveWeights):
    """Before: `quantize_weight(w, ...)` of 1 bit.  After: `dequantize_binary(codes, magnitudes)`.

    Source: BiLLM, arXiv 2402.04291. With U^T U = (X^T X + damping)^-1, for every block of columns,
    as updated by the blocks before it:
    - Columns are ranked by salience, sum over rows of w_ij^2 / U_jj^2, and the first c are salient:
      the c < `most_salient` of least |W - B|^2, where either kind is binarized to a * sign(w),
      a = mean |w| of the row.
    - Salient columns get a residual binarization, a_1 b_1 + a_2 b_2 with signs b: the magnitudes
      a_1 - a_2 and a_1 + a_2.
    - The rest is split into small and large weights, each binarized with its own mean |w|, where
      the squared error is least.
    - Columns are then rounded in turn to the nearest value that their row has for them, and later
      columns make up for the error, inside the block too.

    Where the authors' code differs from their paper, this follows the paper: both searches measure
    the error of W (the code: of the salience matrix), the first binarizes either kind once (the
    code: twice), and no mean is subtracted, which would cost three more numbers a row and block.
    Four things go beyond both, at no cost in bits:
    - The split is the exact optimum of each row. The paper has one of 81 percentiles for the whole
      block; since membership is stored and the threshold is not, all rows may differ.
    - The residual pair of least squared error is found for each row, not a_1 first and then a_2 for
      what it leaves (`residual: greedy`, the paper's).
    - Errors are spread inside a block too, not only behind it (`spread_inside: false`).
    - Blocks, and columns in a block, come by falling mean square of their inputs, while later ones
      can still make up for them (`act_order`); a last block of fewer columns stays the last.

    The paper counts 1 + r bits, r being the share of salient columns (`paper_bits` in the table).
    What a machine must store is more: membership, which takes the place of the residual sign of
    salient columns, makes two bits a weight, and the magnitudes, four bfloat16 a row and block of
    128, another half (`binary_bits`).
    """

    name: ClassVar[str] = "billm"
    integers_only: ClassVar[bool] = True
    note_columns: ClassVar[tuple[str, ...]] = ("block_size", "salient", "paper_bits", "stored_bits")
    block_size: int = 128
    most_salient: int = 50
    damping: float = 1.0
    residual: Literal["joint", "greedy"] = "joint"
    spread_inside: bool = True
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.most_salient < 1 or self.damping < 0:
            raise RecipeError(
                f"billm: block_size {self.block_size} and most_salient {self.most_salient} must be "
                f"at least 1, damping {self.damping} at least 0"
            )

    def check_matmuls(self, gm: fx.GraphModule) -> None:
        check_solvable(self.name, gm, self.check_spec)

    def check_spec(self, name: str, spec: QuantSpec) -> None:
        """Raises RecipeError for schemes of more than one bit."""
        if spec.format != INT1:
            raise RecipeError(
                f"billm makes 1-bit weights, and the scheme of {name} has codes of {spec.format}",
                "give its matmuls the scheme W1A16, or FLOAT",
            )

    def solve(self, problem: WeightProblem) -> Solution:
        """Codes int8 `[n, k]`, magnitudes bfloat16 `[n, 4 * blocks]`, salient int8 `[1, k]`.

        Raises RecipeError for schemes of more than one bit.
        """
        self.check_spec(problem.names[0], problem.spec)
        n, k = problem.weight.shape
        hessian = gram(problem.inputs)
        order = block_order(hessian.diagonal(), self.block_size, self.act_order)
        factor = inverse_factor(hessian, self.damping, order).factor
        salient_magnitudes = best_pair if self.residual == "joint" else residual_pair
        binarizer = Binarizer(
            n, order, factor.diagonal(), self.block_size, self.most_salient, salient_magnitudes
        )
        weight = problem.weight[:, order]
        solve_columns(weight, factor, binarizer, self.block_size, inside=self.spread_inside)
        codes, magnitudes, salient = binarizer.result()
        share = float(salient.double().mean())
        stored = binary_bits(n, k, magnitudes.shape[1], len(problem.names))
        notes = (self.block_size, f"{share:.4f}", f"{1 + share:.3f}", f"{stored:.3f}")
        return Solution(codes, magnitudes, shared={"salient": salient}, notes=notes)

    def dequantize(self, problem: WeightProblem, solution: Solution) -> Tensor:
        """The binarized weight `[n, k]` in the stored dtype."""
        salient = solution.shared["salient"]
        weight: Tensor = dequantize_binary(
            solution.codes, solution.scale, salient, self.block_size, problem.dtype
        )
        return weight

    def store(
        self, gm: fx.GraphModule, store: WeightStore, node: fx.Node, solution: Solution
    ) -> None:
        """`dequantize_binary(unpack_codes(...), ...)` in place of the dequantized weight."""
        stem, weight = stem_of(node), QuantizedWeight.of(node).dequantized
        k = solution.codes.shape[1]
        dequantized = weight.node
        packed = {
            "codes": pack_codes(solution.codes, CODE_BITS),
            "salient": pack_codes(-solution.shared["salient"], 1),
            "magnitudes": solution.scale,
        }
        stored = {
            leaf: tensor_node(dequantized, f"{stem}_{leaf}", store.put(tensor))
            for leaf, tensor in packed.items()
        }
        unpacked = [
            call(dequantized, unpack_codes, (stored[leaf], bits, k), origin=node, suffix=suffix)
            for leaf, bits, suffix in (
                ("codes", CODE_BITS, ".unpacked"),
                ("salient", 1, ".salient"),
            )
        ]
        args = (unpacked[0], stored["magnitudes"], unpacked[1], self.block_size, weight.dtype)
        replace(dequantized, call(dequantized, dequantize_binary, args, origin=dequantized))


def binary_bits(n: int, k: int, magnitudes: int, matrices: int) -> float:
    """Bits a weight of `matrices` with n rows together and this many bfloat16 magnitudes a row."""
    row_bits = 8 * packed_columns(k, CODE_BITS) + 16 * magnitudes
    return (n * row_bits + matrices * 8 * packed_columns(k, 1)) / (n * k)


def block_order(mean_square: Tensor, block_size: int, falling: bool) -> Tensor:
    """Columns `[k]` as they are solved: whole blocks and, within them, columns by mean square."""
    blocks = list(torch.arange(len(mean_square)).split(block_size))
    if not falling:
        return torch.cat(blocks)
    rest = [blocks.pop()] if len(blocks[-1]) < block_size else []
    blocks.sort(key=lambda columns: -float(mean_square[columns].sum()))
    ordered = [
        columns[mean_square[columns].argsort(descending=True, stable=True)]
        for columns in (*blocks, *rest)
    ]
    return torch.cat(ordered)


class Binarizer:
    """Rounds columns to the values of their row and block, which it chooses block by block.

    `order` `[k]` is the weight's column behind each solved one, blocks in one piece; `diagonal`
    `[k]` that of U, as solved.
    """

    def __init__(
        self,
        n: int,
        order: Tensor,
        diagonal: Tensor,
        block_size: int,
        most_salient: int,
        salient_magnitudes: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self.unit = block_size
        self.order = order
        self.sources = order.tolist()
        self.diagonal = diagonal
        self.most_salient = most_salient
        self.salient_magnitudes = salient_magnitudes
        blocks = -(-len(order) // block_size)
        self.codes = torch.empty(len(order), n, dtype=torch.int8)
        self.salient = torch.empty(len(order), dtype=torch.int8)
        self.magnitudes = torch.empty(n, blocks, MAGNITUDES_PER_BLOCK, dtype=torch.bfloat16)
        self.levels: list[tuple[Tensor, Tensor]] = []

    def begin(self, start: int, columns: Tensor) -> None:
        """Choose the salient columns of a block `[size, n]` and its magnitudes."""
        sizes = columns.abs()
        block = slice(start, start + len(sizes))
        salience = (sizes / self.diagonal[block, None].to(sizes.dtype)).square().sum(1)
        falling = salience.argsort(descending=True, stable=True)
        is_salient = torch.zeros(len(sizes), dtype=torch.bool)
        is_salient[falling[: salient_count(sizes[falling], self.most_salient)]] = True
        pairs = (*best_pair(sizes[~is_salient]), *self.salient_magnitudes(sizes[is_salient]))
        stored = self.magnitudes[:, self.sources[start] // self.unit]
        stored.copy_(torch.stack(pairs, 1))
        self.salient[self.order[block]] = is_salient.to(torch.int8)
        small, large, small_salient, large_salient = stored.to(columns.dtype).T.contiguous()
        kinds = ((small, large), (small_salient, large_salient))
        self.levels = [kinds[kind] for kind in is_salient.long().tolist()]

    def round(self, column: int, weight: Tensor) -> Tensor:
        """The nearest of the four values that each row has for this column."""
        small, large = self.levels[column % self.unit]
        is_large = weight.abs() > (small + large) / 2
        code = is_large.to(torch.int8)
        # -1 - code: two's complement, as `dequantize_binary` reads it.
        self.codes[self.sources[column]] = torch.where(weight < 0, ~code, code)
        value = torch.where(is_large, large, small)
        return torch.where(weight < 0, -value, value)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int8 `[n, k]`, magnitudes `[n, 4 * blocks]`, salient int8 `[1, k]`."""
        return self.codes.T.contiguous(), self.magnitudes.flatten(1), self.salient[None]


def salient_count(sizes: Tensor, most: int) -> int:
    """How many of the first columns are salient, from |w| `[size, n]` in order of salience.

    Binarized with a = mean |w|, c weights of a row have the error sum w^2 - (sum |w|)^2 / c, so
    that running sums give the error of every c at once. At least 1 column and fewer than `most`
    or all, where there are as many.
    """
    size = len(sizes)
    candidates = min(most, size) - 1
    if candidates < 1:
        return 0
    running = sizes.double().cumsum(0)
    counts = torch.arange(1, candidates + 1, dtype=torch.float64)[:, None]
    first = running[:candidates]
    explained = first.square() / counts + (running[-1] - first).square() / (size - counts)
    return int(explained.sum(1).argmax()) + 1


def best_pair(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The means `[n]` of the small and the large ones of |w| `[size, n]`, best split by row.

    Of all pairs of magnitudes these have the least squared error; zeros for no columns.
    """
    size = len(sizes)
    if size < 2:
        mean = sizes.sum(0)
        return mean, mean
    running = sizes.double().sort(0).values.cumsum(0)
    counts = torch.arange(1, size, dtype=torch.float64)[:, None]
    first = running[:-1]
    explained = first.square() / counts + (running[-1] - first).square() / (size - counts)
    split = explained.argmax(0)
    below = first.gather(0, split[None])[0]
    count = split + 1
    return (below / count).to(sizes.dtype), ((running[-1] - below) / (size - count)).to(sizes.dtype)


def residual_pair(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """|a_1 - a_2| and a_1 + a_2 of |w| `[size, n]`: a_1 = mean |w|, a_2 = mean ||w| - a_1|."""
    first = sizes.mean(0).nan_to_num_()  # no columns: nothing is read
    second = (sizes - first).abs().mean(0)
    return (first - second).abs(), first + second
