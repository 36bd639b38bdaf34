"""panguq's memory rule for tiles against AscendNPU IR's: a confusion matrix near every limit.

python -m conformance.triton.tile_rule [--seed N] [--tiles N] [--write], in the environment of
`python -m conformance.triton`. Tiles are drawn at random so that, by panguq's rule, the memory in
question is the fullest of all and needs 75 to 125 % of what there is.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from conformance.triton.linalg import TARGETS, linalg_of
from conformance.triton.npu_compiler import compile_linalg
from conformance.triton.variants import variant
from panguq.kernels.ascend.atlas_a2 import ATLAS_A2
from panguq.kernels.ascend.chip import Tile
from panguq.kernels.ascend.own.tiles import tile_memory, tile_refusal

RESULT = Path(__file__).parent.parent / "results" / "triton_tile_rule.json"
SEED = 2
TILES_OF_EACH = 12
MOST_DRAWS = 20_000
# Which memory each kernel can fill, and the steps and largest sizes of its tiles. Sums of W4A16
# fill UB before L0C.
LIMITS: tuple[tuple[str, str, Tile, Tile], ...] = (
    ("w4a16_data_parallel", "ub", (16, 64, 16), (128, 512, 256)),
    ("w4a16_split_k", "ub", (16, 64, 16), (128, 512, 256)),
    ("w8a8_data_parallel", "l1", (16, 32, 32), (256, 512, 2048)),
    ("w8a8_split_k", "l1", (16, 32, 32), (256, 512, 2048)),
    ("w8a8_data_parallel", "l0c", (16, 32, 32), (512, 512, 256)),
    ("w8a8_split_k", "l0c", (16, 32, 32), (512, 512, 256)),
    ("w8a8_data_parallel", "l0b", (16, 32, 32), (16, 2048, 128)),
    ("w8a8_split_k", "ub", (16, 32, 32), (16, 2048, 64)),
    ("dynamic_quant", "ub", (1, 1, 32), (1, 1, 16384)),
)


@dataclass(frozen=True)
class Comparison:
    """One tile: what panguq's rule says and what the compiler does."""

    kernel: str
    memory: str
    tile: Tile
    target: str
    ratio: float
    panguq_accepts: bool
    compiles: bool
    double_buffered: bool  # it compiles without giving that up: what the rule speaks of
    overflow: str | None
    compiler_bytes: int | None


def ratio_of(kernel: str, memory: str, tile: Tile) -> float | None:
    """Needed over available bytes of this memory; None if another one is fuller."""
    needed = asdict(tile_memory(kernel, tile))
    ratios = {name: needed[name] / capacity for name, capacity in ATLAS_A2.memory.items()}
    return ratios[memory] if ratios[memory] == max(ratios.values()) else None


def random_tiles(kernel: str, memory: str, steps: Tile, largest: Tile, seed: int) -> Iterator[Tile]:
    """Different tiles within 25 % of the limit. Raises ValueError where there are no more."""
    chance = random.Random(f"{seed} {kernel} {memory}")
    seen = set()
    for _ in range(MOST_DRAWS):
        sides = [
            step * chance.randint(1, most // step)
            for step, most in zip(steps, largest, strict=True)
        ]
        tile = (sides[0], sides[1], sides[2])
        ratio = ratio_of(kernel, memory, tile)
        if ratio is not None and 0.75 <= ratio <= 1.25 and tile not in seen:
            seen.add(tile)
            yield tile
    raise ValueError(f"{kernel} has {len(seen)} tiles near the limit of {memory}, no more")


def compare(kernel: str, memory: str, tile: Tile, target: str, folder: Path) -> Comparison:
    """Ask both about this tile."""
    at_tile = variant(kernel, tile)
    verdict = compile_linalg(linalg_of(at_tile, target), target, folder, at_tile.name)
    return Comparison(
        kernel=kernel,
        memory=memory,
        tile=tile,
        target=target,
        ratio=round(ratio_of(kernel, memory, tile) or 0.0, 4),
        panguq_accepts=tile_refusal(kernel, tile) is None,
        compiles=verdict.compiles,
        double_buffered=verdict.double_buffered,
        overflow=verdict.overflow,
        compiler_bytes=verdict.required,
    )


def compare_all(seed: int, tiles_of_each: int, folder: Path) -> list[Comparison]:
    """`tiles_of_each` tiles near each limit; the targets take turns."""
    tasks = []
    for kernel, memory, steps, largest in LIMITS:
        tiles = random_tiles(kernel, memory, steps, largest, seed)
        tasks += [(kernel, memory, next(tiles)) for _ in range(tiles_of_each)]
    with ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(
                lambda number: compare(
                    *tasks[number], TARGETS[number % len(TARGETS)], folder / str(number)
                ),
                range(len(tasks)),
            )
        )


def confusion(comparisons: list[Comparison]) -> dict[str, int]:
    """How often which verdicts come together."""
    counts = Counter(
        f"panguq {'accepts' if it.panguq_accepts else 'refuses'}, compiler {_compiler_says(it)}"
        for it in comparisons
    )
    return dict(sorted(counts.items()))


def _compiler_says(it: Comparison) -> str:
    if it.double_buffered:
        return "accepts"
    return "accepts without double buffering" if it.compiles else "refuses"


def report(comparisons: list[Comparison], seed: int) -> dict[str, object]:
    """The result as plain data. A disagreement is about double buffering, as the rule is."""
    groups: dict[str, list[Comparison]] = {}
    for it in comparisons:
        groups.setdefault(f"{it.kernel} {it.memory}", []).append(it)
    return {
        "triton-ascend": version("triton-ascend"),
        "ascendnpu-ir": version("ascendnpu-ir"),
        "seed": seed,
        "tiles": len(comparisons),
        "confusion": confusion(comparisons),
        "by_limit": {name: confusion(part) for name, part in groups.items()},
        "disagreements": [
            asdict(it) for it in comparisons if it.panguq_accepts != it.double_buffered
        ],
    }


def main() -> None:
    """Print the matrix and, with --write, keep it in conformance/results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tiles", type=int, default=TILES_OF_EACH, help="near each limit")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = report(compare_all(options.seed, options.tiles, Path(folder)), options.seed)
    text = json.dumps(result, indent=1)
    print(text)
    if options.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
