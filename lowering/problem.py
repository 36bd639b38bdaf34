"""A matmul to be done, and a kernel that may do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from panguq.ir.number_format import Integer
from panguq.ir.quant_spec import Scheme

Precision = Literal["auto", "bfloat16", "float32"]
Dtype = Literal["bfloat16", "float16", "float32"]
KernelSchedule = Literal["vendor", "data_parallel", "split_k"]
Storage = Literal["float", "int8", "int4", "int4_quarters"]
Tile = tuple[int, int, int]
WeightFormat = Literal["ND", "NZ"]
FormatOption = Literal["auto", "ND", "NZ"]
FLOAT_OP = "linear"
MIXED_WIDTHS = "the weight's groups have several widths"
FLOAT_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class MatmulProblem:
    """`[m, k] x [n, k]^T` under a scheme; m is None where it varies at run time.

    `precision` is the least that weight-only matmuls of a float32 model may multiply in on a CPU.
    `dtype` is the model's and `weight_format` that of stored integer weights, for Ascend targets:
    ND is `[k, n]` row by row, NZ the cube's own order of blocks (npu_format_cast). `own_kernels`
    says whether panguq's own kernels may do it. `mixed` says that groups of the weight have other
    widths than the scheme's, so that the bytes are no plain codes. `experts` is how many such
    weights there are, of which each row meets one and each token `top_k`; 0 where there is only
    one. `biased` says whether experts have biases.
    """

    m: int | None
    n: int
    k: int
    scheme: Scheme
    precision: Precision = "bfloat16"
    dtype: Dtype = "bfloat16"
    weight_format: WeightFormat = "ND"
    own_kernels: bool = True
    mixed: bool = False
    experts: int = 0
    top_k: int = 1
    biased: bool = False

    @property
    def foreign(self) -> str | None:
        """Why a kernel of integers cannot do it: the format that is none; None if all are."""
        other = [known for known in self.scheme.formats if not isinstance(known, Integer)]
        return f"no kernel reads {other[0]}" if other else None

    @property
    def group_size(self) -> int:
        """Inputs per weight scale; k where there are no groups."""
        return self.scheme.weight.group_size_for(self.k) if self.scheme.weight else self.k


@dataclass(frozen=True)
class Candidate:
    """A kernel for a problem; `refusal` says why it is not legal, None if it is.

    `kernel` is the op's name. `splits` and `tile` (block_m, block_n, block_k) belong to panguq's
    own kernels; for a vendor's op CANN chooses them. `storage` is the stored weight it reads:
    kernels of one storage read the same bytes.
    """

    kernel: str
    refusal: str | None = None
    schedule: KernelSchedule = "vendor"
    splits: int = 1
    tile: Tile | None = None
    storage: Storage = "float"

    def __str__(self) -> str:
        parts = [self.kernel]
        if self.splits > 1:
            parts.append(f"splits={self.splits}")
        if self.tile is not None:
            parts.append("tile=" + "x".join(map(str, self.tile)))
        return " ".join(parts)
