"""Replace fake-quant matmuls by the kernel calls of a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_field
from typing import ClassVar

from torch import fx

from panguq.errors import LoweringError
from panguq.ir.edit import erase_unused, label, replace
from panguq.ir.expert_groups import schemes_of
from panguq.ir.node_meta import meta_of, scheme_of
from panguq.ir.properties import Property
from panguq.ir.quant_spec import Scheme
from panguq.ir.views import ExpertLinear, Linear
from panguq.lowering.choice import Choice
from panguq.lowering.graph_problems import matmul_problem
from panguq.lowering.options import DEFAULT_OPTIONS, AscendOptions
from panguq.lowering.problem import MatmulProblem, Precision
from panguq.lowering.select_format import select_format
from panguq.lowering.target import Target
from panguq.lowering.targets import find_target
from panguq.passes.assign_schemes import AssignSchemes
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Table, matmuls


@dataclass(frozen=True)
class LowerMatmuls(Pass):
    """Before: `linear(dequantize(q), dequantize_weight(codes))`.  After: kernel calls on codes.

    On a CPU
    - W8A8, static and dynamic: `int8_linear(q, act_scale, zero_point, codes, weight_scale)`.
    - W8A16: `int8_weight_linear(x, codes, weight_scale)`.
    - BiLLM's weights: `binary_linear(x, ...)` on their packed signs.
    - W4A16: `int4_linear(x, kernel layout of the packed codes)`; beyond `few_tokens` it reads the
      stored codes. The nodes that make the kernel's layout depend only on weights and run at
      loading.
    A weight-only matmul that neither takes, or one that must not round to bfloat16
    (`precision`), becomes `dequantized_linear`, which takes everything, and says so; so do W4A8 and
    W4A4, on dequantized activations.
    - Matmuls of experts: the same kernels, called `expert_int8_linear` and so on.

    On Ascend (x flattened to `[m, k]`, the result viewed as `[..., n]`)
    - W8A8: `npu_quant_matmul(npu_quantize(x), w, deq_scale, bias=int32)`; W8A8_DYNAMIC, W4A8 and
      W4A4: the same on `npu_dynamic_quant(x)` with its scale per token.
    - W8A16, W4A16: `npu_weight_quant_batchmatmul(x, w, scale, offset)`.
    int8 weights of integer matmuls lie in memory as `ascend.weight_format` says: ND, or NZ by an
    `npu_format_cast` that is run once, at loading.
    Where the cost model prefers another kernel on the same stored bytes for some m, the call is
    `dispatch_matmul` with a table over m. More than 65535 outputs are split into several calls.
    """

    name: ClassVar[str] = "lower-matmuls"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ, Property.WEIGHT_CODES})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.LOWERED})
    breaks: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})
    target: str = "cpu"
    precision: Precision = "bfloat16"
    ascend: AscendOptions = DEFAULT_OPTIONS

    def needs(self, earlier: Sequence[Pass]) -> frozenset[Property]:
        """Fake-quant matmuls on integer codes; nothing where the recipe quantizes nothing."""
        quantizes = any(isinstance(p, AssignSchemes) and p.quantizes for p in earlier)
        return self.requires if quantizes else frozenset({Property.SCHEMES})

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        target = find_target(self.target)
        result = PassResult()
        write = target.calls(gm, ctx.store)
        choices = Choices(target, self.precision, self.ascend)
        rows: list[tuple[object, ...]] = []
        for node in [n for n in gm.graph.nodes if Linear.match(n) is not None]:
            scheme = meta_of(node).scheme
            if scheme is None or scheme.is_float:
                continue
            choice = _choice(choices, node)
            if choice.kernel == "dequantized_linear":
                others = "; ".join(f"{kernel}: {why}" for kernel, why in choice.losers)
                result.skip(node, f"no integer kernel: {others or scheme.name}")
            lowered = write(node, choice)
            sources = list(node.all_input_nodes)
            replace(node, lowered)
            erase_unused(sources)
            result.changed += 1
            rows.append(_row(lowered, choice))
        columns = ("matmul", "kernel", "few_tokens", "weight_format", "decode_us", "prefill_us",
                   "table", "others")  # fmt: skip
        result.tables["kernel_choices"] = Table(columns, tuple(rows))
        return result


class Choices:
    """The kernels for a graph's linears under their schemes; equal problems are solved once."""

    def __init__(
        self, target: Target, precision: Precision, ascend: AscendOptions = DEFAULT_OPTIONS
    ) -> None:
        self.target = target
        self.precision = precision
        self.ascend = ascend
        self.known: dict[MatmulProblem, Choice] = {}

    def choose(
        self, node: fx.Node, scheme: Scheme | None = None, members: Sequence[int] = ()
    ) -> Choice:
        """The kernel for this linear, or for some of its experts under a scheme that others have
        not. Raises LoweringError if the target has none."""
        if meta_of(node).expert_schemes and not self.target.takes_mixed_experts:
            raise LoweringError(
                f"target {self.target.name} has no kernel for a matmul whose experts have several "
                f"schemes ({', '.join(found.name for found in schemes_of(node))})",
                "let one glob of the recipe name all experts of a layer",
            )
        limits = (self.precision, self.target.largest_n, members)
        problem = matmul_problem(node, scheme or scheme_of(node), *limits)
        if problem not in self.known:
            options = self.ascend
            allowed = replace_field(problem, own_kernels=options.own_kernels)
            self.known[problem] = select_format(
                allowed, self.target, options.weight_format, options.tokens
            )
        return self.known[problem]


def check_lowerable(gm: fx.GraphModule, target: Target, precision: Precision) -> None:
    """Raises LoweringError if the target has no kernel for a scheme, before any calibration."""
    choices = Choices(target, precision)
    for node in matmuls(gm):
        if meta_of(node).scheme is None or scheme_of(node).is_float:
            continue
        if ExpertLinear.match(node) is not None and not target.takes_experts:
            raise LoweringError(
                f"{label(node)}: target {target.name} has no kernels for matmuls of experts",
                "leave them in float in the recipe",
            )
        for scheme, members in schemes_of(node).items():
            if not scheme.is_float:
                _choice(choices, node, scheme, members)


def _choice(
    choices: Choices, node: fx.Node, scheme: Scheme | None = None, members: Sequence[int] = ()
) -> Choice:
    try:
        return choices.choose(node, scheme, members)
    except LoweringError as error:
        raise LoweringError(f"{label(node)}: {error.message}", error.hint) from None


def _row(node: fx.Node, choice: Choice) -> tuple[object, ...]:
    others = "; ".join(f"{kernel}: {why}" for kernel, why in choice.losers)
    costs = (f"{choice.decode_us:.0f}", f"{choice.prefill_us:.0f}")
    table = "; ".join(
        f"m <= {entry.last_m}: {entry.candidate}" if entry.last_m else str(entry.candidate)
        for entry in choice.table
    )
    where = (choice.few_tokens, choice.weight_format)
    return (label(node), choice.kernel, *where, *costs, table, others)
