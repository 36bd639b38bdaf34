"""Learn codes and scales block by block towards the float block, fixing ever more of the codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, fx

from panguq.decibels import decibels
from panguq.errors import RecipeError
from panguq.ir.analysis.blocks import blocks, cuts
from panguq.ir.edit import ancestors, get_tensor, label
from panguq.ir.node_meta import meta_of, weight_spec_of
from panguq.ir.run.sweep import BlockEnd, Chosen, ExpertPause, PassedBlock, Pause, solving_sweep
from panguq.ir.views import DequantizedWeight, ExpertLinear, Linear, results_of
from panguq.passes.codes.block_learner import BlockLearner, Rates
from panguq.passes.codes.soft_codes import SoftCodes
from panguq.passes.codes.solve_weights import Solved
from panguq.passes.codes.weight_problem import Solution, quantizer_of
from panguq.passes.codes.weight_scales import weight_values
from panguq.passes.gptq import Gptq
from panguq.passes.pipeline.base import PassContext, PassResult, Table
from panguq.tensors.folded_weight import materialized
from panguq.tensors.work_folder import Finished

CALIBRATION_BATCHES = 16
"""For an estimate of the time that the pass takes."""


@dataclass(frozen=True)
class ProgressiveRounding(Gptq):
    """Before: `quantize_weight(w, scale, zero_point)`.  After: codes and scales that were learned.

    GPTQ, whose options these are, chooses the codes of a block of the graph, which ends where one
    value carries everything (the residual stream behind attention, and behind the MLP). Then all
    codes and group scales of the block are learned together: fed by the quantized model in front
    of it, its output is to be that of the float block, fed by the float model, so that a block
    also makes up for the errors of those before it. Of each token's squared error counts the
    token's weight, after weigh-tokens, or else its share of the token's own square.

    1. Every code may move to its neighbour on the side of the float weight, and starts `pull` of
       that way between the two (`SoftCodes`).
    2. In six stages of the same length 0, 50, 75, 90, 97 and 100 % of the codes are fixed: those
       that are the most decided become integers for good, and only the others go on, which make
       up for what that changed. In the last stage scales alone move.
    3. The block keeps GPTQ's codes and scales if its error over all calibration data has not
       fallen.

    Each of the `steps` is Adam's, on `batch_sequences` batches, with learning rates that fall to a
    tenth: `code_rate` for the codes' logits, `scale_rate` for the logarithms of scales. About 60
    bytes for each weight of one block are held. Experts keep GPTQ's codes, and so does the matmul
    that gives a language model's logits.

    In the manner of TesseraQ (arXiv 2410.19103), which starts at the nearest codes and makes 5000
    steps; the block's error between two prefixes is that of CBQ (arXiv 2312.07950).
    """

    name: ClassVar[str] = "progressive-rounding"
    integers_only: ClassVar[bool] = True
    beside_float: ClassVar[bool] = True
    divided: ClassVar[bool] = False
    expert_note: ClassVar[str] = "experts keep gptq's codes"
    steps: int = 96
    batch_sequences: int = 2
    code_rate: float = 0.06
    scale_rate: float = 0.002
    pull: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.batch_sequences < 1:
            raise RecipeError(
                f"{self.name}: steps {self.steps} and batch_sequences {self.batch_sequences} "
                "must be at least 1"
            )
        for rate in ("code_rate", "scale_rate"):
            if not 0.0 <= getattr(self, rate) <= 1.0:
                raise RecipeError(f"{self.name}: {rate} {getattr(self, rate)} must lie in [0, 1]")
        if not 0.0 < self.pull <= 1.0:
            raise RecipeError(f"{self.name}: pull {self.pull} must lie in (0, 1]")

    @property
    def sweeps(self) -> float:
        return 4.0 + 3.0 * self.steps * self.batch_sequences / CALIBRATION_BATCHES

    def sweep(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        batches: Sequence[dict[str, Tensor]],
        pauses: Mapping[fx.Node, Pause | ExpertPause],
        solved: Solved,
        result: PassResult,
    ) -> None:
        """One solving sweep that learns at each block's end."""
        learned = _learned_blocks(gm, ctx, result)
        rows: list[tuple[object, ...]] = []
        ends: dict[fx.Node, BlockEnd] = {
            end: partial(self._learn, gm, ctx, matmuls, solved, rows, (number, len(learned)))
            for number, (end, matmuls) in enumerate(learned.items())
        }
        beside = self.beside_float
        solving_sweep(gm, batches, pauses, ctx.progress, beside, block_ends=ends)
        columns = ("block", "matmuls", "start_error_db", "error_db", "changed_share", "kept")
        result.tables["blocks"] = Table(columns, tuple(rows))

    def _learn(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        matmuls: Sequence[fx.Node],
        solved: Solved,
        rows: list[tuple[object, ...]],
        place: tuple[int, int],
        block: PassedBlock,
    ) -> Chosen:
        end = label(block.nodes[-1])
        own = {matmul: quantizer_of(matmul) for matmul in matmuls}
        starts = {matmul: solved[quantizer.node] for matmul, quantizer in own.items()}

        def compute() -> Finished:
            return self._learned(gm, ctx, block, starts, place)

        done = ctx.once(f"block {end}", compute)
        facts = done.facts
        columns = ("start_error_db", "error_db", "changed_share", "kept")
        rows.append((end, len(own), *(facts[name] for name in columns)))
        chosen = {}
        for number, (matmul, start) in enumerate(starts.items() if facts["kept"] else ()):
            codes, scale = done.tensors[f"{number}.codes"], done.tensors[f"{number}.scale"]
            found = Solution(codes, scale, start.zero_point, start.extra, start.shared, start.notes)
            solved[own[matmul].node] = found
            chosen[Linear.of(matmul).weight] = _values(matmul, found, _weight(gm, matmul))
        return chosen

    def _learned(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        block: PassedBlock,
        starts: Mapping[fx.Node, Solution],
        place: tuple[int, int],
    ) -> Finished:
        """The codes and scales of a block's matmuls, in their order, and what they gained."""
        soft = {}
        for matmul, start in starts.items():
            weight = _weight(gm, matmul)
            spec = weight_spec_of(matmul)
            soft[Linear.of(matmul).weight] = SoftCodes(weight, start, spec, weight.dtype, self.pull)
        learner = BlockLearner(block, _tokens(_last(block, starts)))
        before = learner.error(block.ends)
        rates = Rates(self.steps, self.batch_sequences, self.code_rate, self.scale_rate)
        done, blocks = (number * self.steps for number in place)
        learner.learn(
            soft, rates, ctx.generator(), lambda step: ctx.progress(self.name, done + step, blocks)
        )
        after = learner.error(learner.outputs({node: s.values() for node, s in soft.items()}))
        tensors: dict[str, Tensor] = {}
        changed = total = 0
        for number, (found, start) in enumerate(zip(soft.values(), starts.values(), strict=True)):
            solution = found.solution()
            tensors |= {f"{number}.codes": solution.codes, f"{number}.scale": solution.scale}
            changed += int((solution.codes != start.codes).sum())
            total += solution.codes.numel()
        kept = after < before
        facts = {
            "start_error_db": decibels(before),
            "error_db": decibels(after if kept else before),
            "changed_share": changed / max(total, 1) if kept else 0.0,
            "kept": kept,
        }
        return Finished(tensors if kept else {}, facts)


def _learned_blocks(
    gm: fx.GraphModule, ctx: PassContext, result: PassResult
) -> dict[fx.Node, list[fx.Node]]:
    """The matmuls whose codes are learned in each block that has some, by the block's last node."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    gives_logits = results_of(gm)[0] if ctx.interface.kind == "causal_lm" else None
    ends = set(cuts(gm))
    for block in blocks(gm):
        matmuls = [node for node in block if _has_codes_to_learn(node)]
        end = block[-1]
        reached = ancestors([end]) if matmuls else set()
        for node in matmuls:
            codes = quantizer_of(node).node
            reason = None
            if codes in seen:
                continue  # its weight is another's, whose block has learned it
            if end is gives_logits:
                reason = "it gives the logits"
            elif end not in ends or node not in reached:
                reason = "no value behind it carries everything"
            elif not _is_float(end):
                reason = "its block ends in codes"
            if reason is not None:
                result.skip(node, f"{reason}: its codes are gptq's")
                continue
            seen.add(codes)
            found.setdefault(end, []).append(node)
    return found


def _is_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_codes_to_learn(node: fx.Node) -> bool:
    linear = Linear.match(node)
    if linear is None or ExpertLinear.match(node) is not None or meta_of(node).scheme is None:
        return False
    weight = DequantizedWeight.match(linear.weight)
    return weight is not None and weight.quantizer is not None


def _weight(gm: fx.GraphModule, matmul: fx.Node) -> Tensor:
    """The float weight `[n, k]`."""
    return materialized(get_tensor(gm, quantizer_of(matmul).weight_name))


def _values(matmul: fx.Node, solution: Solution, weight: Tensor) -> Tensor:
    spec = weight_spec_of(matmul)
    size = spec.group_size_for(int(weight.shape[1]))
    grid = (solution.scale, solution.zero_point, size, spec)
    return weight_values(solution.codes, *grid, weight.dtype)


def _last(block: PassedBlock, matmuls: Mapping[fx.Node, object]) -> fx.Node:
    """The matmul whose output is nearest to the block's."""
    return [node for node in block.nodes if node in matmuls][-1]


def _tokens(matmul: fx.Node) -> list[Tensor] | None:
    """The weights `[tokens]` of each batch, where weigh-tokens gave the matmul some."""
    weights = meta_of(matmul).token_weights
    if weights is None:
        return None
    return [batch if batch.dim() == 1 else batch.mean(0) for batch in weights]
