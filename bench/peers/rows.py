"""Which quantizer runs which method on which model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.peers.environments import GPTQMODEL, LLM_COMPRESSOR, MSMODELSLIM, PANGUQ, Peer

# 576, SmolLM2's hidden size, is no multiple of 128; the random model's sizes are.
GROUP_SIZES = {"smollm2": 64, "random": 128}
METHODS = {
    "gptq": "GPTQ W4A16",
    "plain-gptq": "GPTQ W4A16, tokens not weighed",
    "awq": "AWQ W4A16",
    "awq-asym": "AWQ W4A16 asymmetric",
    "w8a8-dynamic": "W8A8 dynamic",
    "w8a8": "W8A8 static",
}
_PEERS: dict[tuple[str, str], tuple[Peer, ...]] = {
    ("smollm2", "gptq"): (PANGUQ, GPTQMODEL, LLM_COMPRESSOR),
    ("smollm2", "plain-gptq"): (PANGUQ,),
    ("smollm2", "awq"): (PANGUQ, GPTQMODEL, LLM_COMPRESSOR),
    ("smollm2", "awq-asym"): (PANGUQ, GPTQMODEL, LLM_COMPRESSOR),
    ("smollm2", "w8a8-dynamic"): (PANGUQ, LLM_COMPRESSOR, MSMODELSLIM),
    ("smollm2", "w8a8"): (PANGUQ, MSMODELSLIM),
    ("random", "gptq"): (PANGUQ, GPTQMODEL, LLM_COMPRESSOR),
    ("random", "plain-gptq"): (PANGUQ,),
    ("random", "awq"): (PANGUQ, GPTQMODEL, LLM_COMPRESSOR),
}


@dataclass(frozen=True)
class PeerRow:
    """One line of the comparison."""

    model: str
    method: str
    peer: Peer

    @property
    def name(self) -> str:
        """`smollm2/gptq/GPTQModel`."""
        return f"{self.model}/{self.method}/{self.peer.name}"


def rows(
    models: Sequence[str] = (), methods: Sequence[str] = (), peers: Sequence[str] = ()
) -> Iterator[PeerRow]:
    """All rows, or those of these models, methods and peers."""
    for (model, method), found in _PEERS.items():
        for peer in found:
            wanted = ((model, models), (method, methods), (peer.name, peers))
            if all(not allowed or value in allowed for value, allowed in wanted):
                yield PeerRow(model, method, peer)
