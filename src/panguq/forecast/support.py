"""What a server will say to a scheme, in sentences."""

from __future__ import annotations

from panguq.ir.quant_spec import Scheme
from panguq.server_releases import find_server
from panguq.servers import READS, support


def unsupported(server: str, scheme: Scheme) -> list[str]:
    """Why the server has no kernel for dense matmuls of this scheme; nothing if it has one."""
    if scheme.is_float:
        return []
    known = find_server(server)
    weight = scheme.weight
    grouped = weight is not None and weight.granularity == "per_group"
    size = weight.group_size if grouped and weight is not None else None
    answers = [support(known, form, scheme.name, size) for form in READS[known]]
    if any(answer.takes for answer in answers):
        return []
    return [
        f"{server} takes no dense {scheme.name} that panguq writes: {answers[0].reason}; what it "
        f"takes is {answers[0].instead}"
    ]
