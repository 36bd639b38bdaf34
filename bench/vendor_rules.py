"""What CATLASS' and CANN's published rules choose for openPangu's matmuls, beside the cost model.

The rules are for float16 and count tiles of 128 x 256; sources: CATLASS example 102
(select_kernel_b16), splitk_matmul.hpp; CANN ops-nn matmul_v3_base_tiling (SupportMultiSplitK).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from bench.timings import best_split_k
from panguq.ir.quant_spec import SCHEMES
from panguq.lowering.ascend.cost.model import cost
from panguq.lowering.problem import Candidate, MatmulProblem, Tile
from panguq.lowering.select_kernel import select_kernel
from panguq.lowering.target import Target

TOKENS = (1, 64, 128, 256, 512, 1024, 2048)
SHAPES: dict[str, tuple[int, int]] = {  # n, k
    "7B q, o": (4096, 4096),
    "7B k, v": (1024, 4096),
    "7B qkv": (6144, 4096),
    "7B gate, up": (12800, 4096),
    "7B gate_up": (25600, 4096),
    "7B down": (4096, 12800),
    "1B q, o": (1536, 1536),
    "1B k, v": (768, 1536),
    "1B qkv": (3072, 1536),
    "1B gate, up": (6144, 1536),
    "1B down": (1536, 6144),
}
FLOAT16_TILES: tuple[Tile, ...] = (
    (16, 256, 256),
    (64, 256, 256),
    (128, 128, 256),
    (128, 256, 256),
    (256, 128, 256),
)


def catlass(m: int, n: int, k: int, cores: int) -> str:
    """The schedule of CATLASS' rule: data_parallel, split_k xN or stream_k."""
    tiles = ceil(m / 128) * ceil(n / 256)
    if tiles <= cores and k <= 256:
        return "data_parallel"
    if (tiles <= cores / 2 and k > 5120) or (tiles <= 2 and k > 1024):
        most = next((f for limit, f in ((1024, 2), (2048, 4), (4096, 8)) if k <= limit), 16)
        return f"split_k x{min(cores // tiles, cores if k >= 12288 else most)}"
    if cores < tiles < 8 * cores and 0 < tiles % cores < 0.8 * cores and k > 3072:
        return "stream_k"
    return "data_parallel"


def cann(m: int, n: int, k: int, cores: int) -> str:
    """The schedule of CANN's rule for a weight `[k, n]` in float16."""
    few = ceil(m / 128) * ceil(n / 128) < cores / 2
    return "split_k" if (k >= cores * 384 and few) or k >= 27392 else "data_parallel"


@dataclass(frozen=True)
class Row:
    """A matmul: the rules' choices and the model's, with predicted microseconds in float16."""

    name: str
    m: int
    n: int
    k: int
    catlass: str
    cann: str
    whole_us: float
    split_us: float
    split_how: str
    w8a8: str

    @property
    def predicted(self) -> str:
        """The cheaper schedule by the model, for float16."""
        return "data_parallel" if self.whole_us <= self.split_us else "split_k"

    @property
    def agrees(self) -> bool:
        """Whether CATLASS' rule and the model divide k, or both do not."""
        return (self.catlass != "data_parallel") == (self.predicted != "data_parallel")

    @property
    def agrees_with_cann(self) -> bool:
        """Whether CANN's rule and the model divide k, or both do not."""
        return self.cann == self.predicted

    def why(self) -> str:
        """Why the model disagrees with a rule; empty if it agrees with both."""
        if self.agrees and self.agrees_with_cann:
            return ""
        lead = f"{self.whole_us:.1f} us without, {self.split_us:.1f} us with Split-K: "
        if self.predicted == "data_parallel" and self.catlass == "stream_k":
            return lead + (
                "the last wave of 128 x 256 tiles leaves cores idle; the model cuts the result "
                "into one rectangle a core instead, and pays no vector cores"
            )
        if self.predicted == "data_parallel":
            return lead + (
                "few 128 x 256 tiles; the model narrows the tiles until all cores have one, which "
                "costs no partial sums and no vector cores"
            )
        return lead + (
            "many tiles in whole waves load a little less than one rectangle a core, and partial "
            "sums cost less than that"
        )


def rows(target: Target) -> list[Row]:
    """Every shape with every m."""
    cores = int(target["cube_cores"])
    found = []
    for name, (n, k) in SHAPES.items():
        table = select_kernel(MatmulProblem(None, n, k, SCHEMES["W8A8_DYNAMIC"]), target).table
        for m in TOKENS:
            problem = MatmulProblem(m, n, k, SCHEMES["FLOAT"], dtype="float16")
            # hides no more of fetching than CANN's kernel does, which it is compared with
            exposed = target["float_exposed"]
            split = best_split_k(problem, FLOAT16_TILES, "nk", target, exposed)
            own = next(e.candidate for e in table if e.last_m is None or m <= e.last_m)
            found.append(
                Row(
                    name,
                    m,
                    n,
                    k,
                    catlass(m, n, k, cores),
                    cann(m, n, k, cores),
                    cost(Candidate("linear"), problem, target).total_us,
                    split.total_us,
                    split.how,
                    str(own),
                )
            )
    return found
