"""What a call of one of CANN's ops costs on a target, and where its constants are from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from panguq.errors import LoweringError
from panguq.lowering.ascend.machine import AscendMachine
from panguq.lowering.ascend.op_times.call import VendorCall
from panguq.lowering.ascend.op_times.fitted import FITTED, REFERENCE, ROWS
from panguq.lowering.ascend.op_times.matmul import MATMULS, matmul_cost
from panguq.lowering.ascend.op_times.models import FAMILIES, MODELS, UNMODELLED
from panguq.lowering.target import Cost, Target

_FAMILY = {op: family for family, ops in FAMILIES.items() for op in ops}


def machine_of(target: Target) -> AscendMachine:
    """The target, if it is one whose ops have prices. Raises LoweringError for another."""
    if not isinstance(target, AscendMachine):
        raise LoweringError(
            f"target {target.name} has no times of ops", "choose an Ascend target, as ascend910b2"
        )
    return target


def price(call: VendorCall, machine: AscendMachine) -> Cost:
    """Microseconds of a call by term. Raises LoweringError, saying why, for an op that has no
    model and for operands that the op does not take."""
    try:
        if call.op in MATMULS:
            return matmul_cost(call, machine)
        if call.op not in MODELS:
            reason = UNMODELLED.get(call.op, "no model of it exists")
            raise LoweringError(f"{call.op}: {reason}")
        constants = constants_of(call.op, machine)
        return MODELS[call.op].price(call, machine, constants)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise LoweringError(f"{call.op}: its operands or attributes do not fit: {what}") from None


def constants_of(op: str, machine: AscendMachine) -> Mapping[str, float]:
    """An op's constants on this part: fitted on the chip's timed part, and rates of memory carried
    over in proportion. Raises LoweringError for a chip that nothing was fitted on."""
    fitted = FITTED.get(machine.kind)
    if fitted is None:
        raise LoweringError(f"{op}: nothing was timed on a target of kind {machine.kind!r}")
    found = dict(fitted[_FAMILY.get(op, op)])
    reference = REFERENCE[machine.kind]
    cycles = machine["vector_cores"] * machine["clock_mhz"]
    for name, value in found.items():
        if name.endswith("memory_gb_per_s") or name == "layout_spill_gb_per_s":
            found[name] = value * machine["hbm_gb_per_s"] / reference["hbm_gb_per_s"]
        elif name.endswith("gb_per_s"):
            found[name] = value * cycles / reference["vector_cores"] / reference["clock_mhz"]
    return found


def source_of(op: str, machine: AscendMachine) -> str:
    """Where the numbers behind a price are from, in words."""
    part = REFERENCE[machine.kind]["part"] if machine.kind in REFERENCE else machine.name
    if op in MATMULS:
        return MATMULS[op] + f": constants of target {machine.name}"
    rows = ROWS[machine.kind][_FAMILY.get(op, op)]
    family = _FAMILY.get(op, op)
    own = family == op or family not in MODELS
    of = "the op" if own else f"{family}, which does the same to rows"
    text = f"fitted to {rows} published times of {of} on {part} (hicann/cann-bench d59d44ca)"
    same = machine.name == part
    return text if same else f"{text}, carried over by cores, clock and memory"


def summed(costs: Sequence[Cost]) -> Cost:
    """One cost of calls that follow one another."""
    terms: dict[str, float] = {}
    for cost in costs:
        for name, us in cost.terms.items():
            terms[name] = terms.get(name, 0.0) + us
    return Cost(sum(cost.total_us for cost in costs), terms)
