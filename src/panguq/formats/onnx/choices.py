"""Which kernel a lowered matmul runs, and its predicted time, as text to stand beside its node."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from panguq.ir.node_meta import meta_of
from panguq.ir.quant_spec import Scheme
from panguq.lowering.targets import find_target, known_targets


class KernelNotes:
    """`panguq.kernel`, `.schedule`, `.splits`, `.tile` and `.predicted_us` of a matmul's node.

    A dispatch has one line a row of its table: `m <= 64: w4a16_split_k splits=8 tile=16x128x256`.
    Times are the cost model's for m = 1, 16 and 512 tokens, in microseconds; they are left out
    without a target.
    """

    def __init__(self, target: str | None) -> None:
        self.predicts = target is not None
        self.targets = known_targets() if target is None else (find_target(target),)

    def __call__(self, node: fx.Node) -> Mapping[str, str]:
        scheme = _scheme(node)
        for target in self.targets:
            if found := target.notes(node, scheme, self.predicts):
                return found if scheme is None else {"panguq.scheme": scheme.name, **found}
        return {}


def kernel_notes(target: str | None) -> KernelNotes:
    """The notes of a graph that was lowered for `target`. Raises LoweringError if unknown."""
    return KernelNotes(target)


def _scheme(node: fx.Node) -> Scheme | None:
    """The scheme of the matmul; of a kernel's call, that of the view or sum that ends it."""
    for _ in range(4):
        scheme = meta_of(node).scheme
        if scheme is not None:
            return scheme
        if not node.users:
            return None
        node = next(iter(node.users))
    return None
