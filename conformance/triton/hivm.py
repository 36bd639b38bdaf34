"""What AscendNPU IR's compiler makes of a kernel for its vector cores, read from its last text.

That text is what CANN's `hivmc` would get: calls of vector instructions and moves, one function for
the cube core (`_mix_aic`) and one for the two vector cores of a pair (`_mix_aiv`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CALL = re.compile(r"call @(\w+)\(([^)]*)\)")
_VALUE = re.compile(r"\s*(%\w+)(?::\d+)? = ([\w.]+) ?(.*)")
_MOVES = ("load_", "store_", "copy_ubuf", "nd2nz", "fixpipe")
SUB_BLOCK = "{limit_sub_block_id0}"


@dataclass(frozen=True)
class Event:
    """One step of the vector cores: a call, or a synchronization.

    `argument`: the number of the kernel's pointer that a load reads or a store writes, if any.
    `first_core_only`: the second vector core of the pair skips it. `depth`: of loops around it.
    """

    what: str
    argument: int | None = None
    first_core_only: bool = False
    depth: int = 0
    text: str = ""


def vector_function(text: str) -> list[str]:
    """The lines of the function for vector cores; of the only one where the kernel has no cube."""
    lines = text.splitlines()
    starts = [n for n, line in enumerate(lines) if re.match(r"  func\.func @\w+_mix_aiv\(", line)]
    if not starts:
        starts = [n for n, line in enumerate(lines) if "hacc.entry" in line]
    first = starts[0]
    last = next(n for n in range(first + 1, len(lines)) if lines[n].startswith("  }"))
    return lines[first:last]


def events(text: str) -> list[Event]:
    """What vector cores do, in the order of the text."""
    found: list[Event] = []
    origins: dict[str, str] = {}
    open_at: list[tuple[int, bool]] = []  # where each region began in `found`; is it a loop?
    for line in vector_function(text)[1:]:
        if value := _VALUE.match(line):
            operand = re.search(r"%\w+", value[3])
            if operand and ("memref" in value[2] or value[2].endswith("view")):
                origins[value[1]] = origins.get(operand[0], operand[0])
        depth = sum(is_loop for _, is_loop in open_at)
        if call := _CALL.search(line):
            argument = _pointer(call[2], origins)
            found.append(Event(call[1], argument, depth=depth, text=line.strip()))
        elif sync := re.search(r"hivm\.hir\.((?:sync_block|set_flag|wait_flag|pipe_b)\w*.*)", line):
            found.append(Event(sync[1].split(" flag")[0], depth=depth, text=line.strip()))
        closed = line.strip()
        if closed.startswith("}") and open_at:
            start, _ = open_at.pop()
            if SUB_BLOCK in closed:
                found[start:] = [
                    Event(it.what, it.argument, True, it.depth, it.text) for it in found[start:]
                ]
        if closed.endswith("{"):
            open_at.append((len(found), "scf.for" in closed))
    return found


def _pointer(arguments: str, origins: dict[str, str]) -> int | None:
    """The number of the kernel's pointer among the operands; the first three are the compiler's."""
    for operand in re.findall(r"%\w+", arguments):
        root = origins.get(operand, operand)
        if (number := re.fullmatch(r"%arg(\d+)", root)) and int(number[1]) >= 3:
            return int(number[1]) - 3
    return None


def split_k_faults(text: str, pointers: dict[str, int]) -> list[str]:
    """What would make the Split-K kernels wrong on two vector cores and a cube core at once.

    pointers: the places of `partials`, `flags` and `result`. Only the first vector core of a pair
    may raise flags and write results: it alone knows that its own flag was raised before it read.
    """
    steps, faults = events(text), []
    raised = _first(steps, "store_", pointers["flags"], 0)
    read = _first(steps, "load_", pointers["flags"], raised)
    before = [it.what for it in steps[:raised]]
    waited = [
        n
        for n, what in enumerate(before)
        if what.startswith("sync_block_wait[<VECTOR>, <PIPE_FIX>")
    ]
    stored = [
        n
        for n, it in enumerate(steps[:raised])
        if it.what.startswith("store_") and it.argument == pointers["partials"]
    ]
    if stored:  # by the vector cores themselves: their own stores must have ended
        ended = "wait_flag[<PIPE_MTE3>, <PIPE_MTE2>"
        waited = [n for n in range(stored[-1], raised) if before[n].startswith(ended)]
    own_sum = _first(steps, "load_", pointers["partials"], waited[0]) if waited else len(steps)
    if own_sum > raised:
        faults.append("a flag may be raised before the sums are stored")
    between = [it.what for it in steps[raised:read]]
    if not any(what.startswith("wait_flag[<PIPE_MTE3>, <PIPE_MTE2>") for what in between):
        faults.append("flags may be read before the program's own is raised")
    if _first(steps, "load_", pointers["partials"], raised) < read:
        faults.append("sums of other programs may be read before their flags")
    for name in ("flags", "result", *(["partials"] if stored else [])):
        stores = [
            it for it in steps if it.what.startswith("store_") and it.argument == pointers[name]
        ]
        if not stores or not all(it.first_core_only for it in stores):
            faults.append(f"both vector cores of a pair store {name}")
    if any("sync_block_lock" in it.what for it in steps):
        faults.append("programs wait for each other's locks")
    return faults


def _first(steps: list[Event], what: str, argument: int, start: int) -> int:
    """The first such step from `start` on; the number of steps if there is none."""
    for place in range(start, len(steps)):
        if steps[place].what.startswith(what) and steps[place].argument == argument:
            return place
    return len(steps)


_BITS = {"i8": 8, "i16": 16, "f16": 16, "bf16": 16, "i32": 32, "f32": 32}
VECTOR_BITS = 256 * 8  # of a vector instruction's operand


def vector_instructions(text: str) -> dict[str, float]:
    """Vector instructions of both vector cores in one round of the loop over k, by their names.

    An operand's size is that of the buffer that a call's last operand was cast from.
    """
    sizes: dict[str, float] = {}
    found: dict[str, float] = {}
    cores = 1 if SUB_BLOCK in text else 2
    regions: list[bool] = []  # open ones; is it a loop?
    for line in vector_function(text)[1:]:
        cast = re.search(r"(%\w+) = memref\.cast %\w+ : memref<([\dx]+)x([a-z]+\d+)[,>]", line)
        if cast:
            count = 1
            for side in cast[2].split("x"):
                count *= int(side)
            sizes[cast[1]] = count * _BITS[cast[3]] / VECTOR_BITS
        call = _CALL.search(line)
        if call and any(regions) and not call[1].startswith((*_MOVES, "broadcast")):
            known = [sizes[name] for name in re.findall(r"%\w+", call[2]) if name in sizes]
            if known:
                found[call[1]] = found.get(call[1], 0.0) + cores * max(known)
        if line.rstrip().endswith("{"):
            regions.append("scf.for" in line)
        elif line.strip().startswith("}") and regions:
            regions.pop()
    return found
