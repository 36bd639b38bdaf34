"""Decide how each matmul is to be quantized."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import fx

from panguq.errors import RecipeError
from panguq.ir.analysis.choices import deciding_linears
from panguq.ir.edit import label, module_path, op_name
from panguq.ir.expert_groups import give_schemes, paths_of
from panguq.ir.node_meta import annotate, meta_of, scheme_of
from panguq.ir.quant_spec import SCHEMES, Scheme, parse_scheme
from panguq.ir.views import Linear, by_input, results_of
from panguq.passes.pipeline.base import Pass, PassContext, PassResult, Property, Table, matmuls
from panguq.passes.pipeline.module_globs import check_globs

aten = torch.ops.aten


@dataclass(frozen=True)
class AssignSchemes(Pass):
    """Before: linears.  After: the same, each with its scheme; no number changes.

    `schemes` maps globs over module paths to scheme names; the last match wins. A matmul whose
    result is the graph's first output (the logits) has the scheme `head`, and not the default's,
    unless a glob other than `*` names it. Experts have paths of their own, such as
    `model.layers.0.mlp.experts.3.down_proj`: a glob that names some of a matmul's experts gives
    them another scheme than the rest, with the same activations, or none. Matmuls that read one
    tensor (q, k, v; gate, up) are fused by servers and share one scheme: if the globs disagree,
    that is an error. A matmul that decides something, as a router does, stays float:
    `ir/analysis/choices.py` finds it.
    """

    name: ClassVar[str] = "assign-schemes"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.CANONICAL})
    establishes: ClassVar[frozenset[Property]] = frozenset({Property.SCHEMES})
    exact: ClassVar[bool] = True
    schemes: tuple[tuple[str, str], ...] = (("*", "FLOAT"),)
    head: str = "FLOAT"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        result = PassResult()
        rows = []
        check_globs("the recipe's scheme for", self.globs, gm, ctx.allow_unmatched)
        deciding = deciding_linears(gm)
        for node in matmuls(gm):
            scheme, reason = self.choose(node)
            if not scheme.is_float and node in deciding:
                scheme = SCHEMES["FLOAT"]
                reason = f"a choice follows from its result ({op_name(deciding[node])})"
            weight = scheme.weight
            if weight is not None:
                k = Linear.of(node).shape[1]
                try:
                    group_size = weight.group_size_for(k)
                except ValueError as error:
                    scheme, reason = SCHEMES["FLOAT"], str(error)
                else:
                    wanted = weight.group_size
                    if wanted is not None and group_size != wanted:
                        reason = f"group_size {group_size}: {wanted} does not divide k = {k}"
            annotate(node, scheme=scheme)
            if not scheme.is_float or node not in deciding:
                self._of_experts(node)
            result.changed += not scheme.is_float
            if reason:
                result.skip(node, reason)
            rows.append((label(node), scheme.name, reason))
        _check_siblings(gm, deciding)
        result.tables["schemes"] = Table(("matmul", "scheme", "note"), tuple(rows))
        return result

    @property
    def globs(self) -> tuple[str, ...]:
        return tuple(glob for glob, _ in self.schemes)

    @property
    def given_schemes(self) -> tuple[Scheme, ...]:
        return tuple(parse_scheme(name) for name in (*dict(self.schemes).values(), self.head))

    @property
    def quantizes(self) -> bool:
        """Whether any glob asks for quantization at all."""
        return any(not scheme.is_float for scheme in self.given_schemes)

    def choose(self, node: fx.Node) -> tuple[Scheme, str]:
        """The scheme of this linear and, where it is not the plain choice, why."""
        return self.scheme_for(module_path(node), lambda: gives_logits(node))

    def _of_experts(self, node: fx.Node) -> None:
        """Give single experts the schemes of globs that name them and not all."""
        whole, *each = paths_of(node)
        last = {p: max((i for i, g in enumerate(self.globs) if fnmatchcase(p, g)), default=-1)
                for p in (whole, *each)}  # fmt: skip
        if all(last[path] <= last[whole] for path in each):
            return
        k, schemes = Linear.of(node).shape[1], []
        for path in each:
            own = last[path] > last[whole]
            scheme = parse_scheme(self.schemes[last[path]][1]) if own else scheme_of(node)
            if scheme.weight is not None:
                try:
                    scheme.weight.group_size_for(k)
                except ValueError as error:
                    raise RecipeError(f"{path}: {error}", "choose another scheme for it") from None
            schemes.append(scheme)
        inputs = {scheme.activation for scheme in schemes if not scheme.is_float}
        if len(inputs) > 1:
            names = ", ".join(dict.fromkeys(scheme.name for scheme in schemes))
            raise RecipeError(
                f"the experts of {whole} have schemes that quantize their inputs in several "
                f"ways: {names}",
                "experts of one layer may differ in their weights alone, as W4A16 and W8A16, or "
                "W4A8 and W8A8_DYNAMIC, or stay FLOAT",
            )
        give_schemes(node, schemes)

    def scheme_for(self, path: str, is_head: Callable[[], bool]) -> tuple[Scheme, str]:
        """As `choose`, for the linear of the module at `path`, which may give the logits."""
        matches = [(g, s) for g, s in self.schemes if fnmatchcase(path, g)]
        if not matches:
            return SCHEMES["FLOAT"], "no glob of the recipe matches it"
        glob, name = matches[-1]
        if glob == "*" and is_head():
            scheme = parse_scheme(self.head)
            return scheme, "it gives the logits" + _TO_QUANTIZE if scheme.is_float else ""
        return parse_scheme(name), ""


_TO_QUANTIZE = "; name it in the recipe to quantize it"
_OF_TRANSFORMERS = ("logit_positions", "input_ids", "pixel_values", "input_features")
"""Inputs that say that a graph is one of transformers' models, whose last linear is its head."""
_PICKS = (aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.select.int)


def gives_logits(node: fx.Node) -> bool:
    """Whether this linear gives the logits (or scores, or embeddings) of one of transformers'
    models, perhaps scaled, capped or picked at some tokens on the way."""
    graph = node.graph
    if not any(p.target in _OF_TRANSFORMERS for p in graph.nodes if p.op == "placeholder"):
        return False
    gm = graph.owning_module
    assert gm is not None
    result = results_of(gm)[0]
    while result is not node and Linear.match(result) is None:
        inputs = [n for n in result.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        inputs = inputs[:1] if result.target in _PICKS else inputs
        if len(inputs) != 1 or inputs[0].op != "call_function":
            return False
        result = inputs[0]
    return result is node


def _named(node: fx.Node) -> str:
    each = meta_of(node).expert_schemes
    return ", ".join(scheme.name for scheme in each) if each else scheme_of(node).name


def _check_siblings(gm: fx.GraphModule, spared: Container[fx.Node]) -> None:
    for siblings in by_input(n for n in matmuls(gm) if n not in spared).values():
        names = {module_path(n): _named(n) for n in siblings}
        if len(set(names.values())) > 1:
            listed = ", ".join(f"{path} {name}" for path, name in names.items())
            raise RecipeError(
                f"matmuls that read one tensor must share a scheme, but: {listed}",
                "servers fuse them into one matmul; let one glob name them all",
            )
