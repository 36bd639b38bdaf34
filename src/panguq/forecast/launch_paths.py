"""What a server's own work costs, by server, version and mode: measured ones alone.

Before a kernel runs, a server has to schedule the request, walk through the model in Python and
hand every kernel to the driver. Where that takes longer than the kernels, it is what a token takes,
and no quantization shows. No device's constants say how long it is; whole-model timings do.
"""

from __future__ import annotations

from dataclasses import dataclass

from panguq.errors import InputError
from panguq.server_releases import SERVERS, split_server
from panguq.suggest import did_you_mean

MODES = ("graph", "eager")


@dataclass(frozen=True)
class LaunchPath:
    """Microseconds of a server's host for one step of one replica.

    layer_us: a decoding step of one sequence, for each layer; prompt_layer_us: a step that has
    prompts in it. Both are of a layer of `layer_kernels` kernels. batch_us: a decoding step of more
    than one sequence, once; sequence_us: each further sequence; quantize_us: each kernel that
    quantizes the inputs of matmuls. step_tokens: the most tokens in a step. measured_on, schemes,
    batches: what was timed, the most sequences among it. source: where the numbers are from.
    """

    server: str
    versions: tuple[str, ...]
    mode: str
    layer_us: float
    prompt_layer_us: float
    batch_us: float
    sequence_us: float
    quantize_us: float
    layer_kernels: int
    step_tokens: int
    measured_on: str
    schemes: tuple[str, ...]
    batches: int
    source: str

    @property
    def name(self) -> str:
        """As it is asked for: `vllm-ascend==0.9.2`."""
        return f"{self.server}=={self.versions[0]}"

    def prompt(self, layers: int, kernels: int, quantizers: int, tokens: int) -> dict[str, float]:
        """Microseconds by part, of a prompt of `tokens`, in as many steps as it needs; the other
        arguments are those of `decode`."""
        steps = -(-tokens // self.step_tokens)
        layer = self.prompt_layer_us * self._longer(kernels) * layers
        return {
            "layers": steps * layer,
            "further_sequences": 0.0,
            "quantizers": steps * quantizers * self.quantize_us,
        }

    def decode(
        self, layers: int, kernels: int, quantizers: int, sequences: int
    ) -> dict[str, float]:
        """Microseconds by part, of a decoding step. kernels: of a layer, without those that
        quantize inputs; quantizers: these, of the whole model."""
        further = self.batch_us * (sequences > 1) + self.sequence_us * (sequences - 1)
        return {
            "layers": self.layer_us * self._longer(kernels) * layers,
            "further_sequences": further,
            "quantizers": quantizers * self.quantize_us,
        }

    def _longer(self, kernels: int) -> float:
        """How many times the layers that were timed a layer of so many kernels is. A shorter one
        is not taken to be cheaper: none was timed."""
        return max(1.0, kernels / self.layer_kernels)


EAGER_LAYER_US = 1147.0
_LOGS = (
    "fitted by bench.model_cost to 155 latencies of openPangu-Embedded-1B on a 910B2 (vLLM 0.9.2, "
    "vllm-ascend 0.9.2rc1; VivianZan/Ascend-Pangu-Infer 0e86cf93); quantizing kernels: 10.1 us, "
    "the mean of AscendQuantV2 in Horacehxw/msModeling's reports of an A3 die"
)


def _vllm_ascend(mode: str, layer_us: float, schemes: tuple[str, ...]) -> LaunchPath:
    return LaunchPath(
        server="vllm-ascend",
        versions=("0.9.2", "0.9.2rc1"),
        mode=mode,
        layer_us=layer_us,
        prompt_layer_us=EAGER_LAYER_US,
        batch_us=1451.0,
        sequence_us=87.0,
        quantize_us=10.1,
        layer_kernels=13,
        step_tokens=8192,  # vLLM's default of max_num_batched_tokens for a library call
        measured_on="openPangu-Embedded-1B on one Ascend 910B2",
        schemes=schemes,
        batches=8,
        source=_LOGS,
    )


# Newest release last.
LAUNCH_PATHS: tuple[LaunchPath, ...] = (
    _vllm_ascend("graph", 462.0, ("FLOAT", "W8A8")),
    _vllm_ascend("eager", EAGER_LAYER_US, ("FLOAT",)),
)


def find_launch_path(asked: str, mode: str = "graph") -> LaunchPath:
    """The path of `NAME` or `NAME==VERSION`; without a version, the newest that was measured.

    Raises InputError, in a sentence, for a server that panguq does not know, and for one, a version
    or a mode that nobody measured.
    """
    name, version = split_server(asked)
    if mode not in MODES:
        raise InputError(f"mode {mode!r:.40}: a server runs in graph or eager mode", "--mode graph")
    if name not in SERVERS:
        raise InputError(f"unknown server {name!r:.80}", did_you_mean(name, SERVERS, "servers"))
    found = [path for path in LAUNCH_PATHS if path.server == name]
    if not found:
        raise InputError(f"nobody measured the launch path of {name}", f"known: {known_paths()}")
    if version is not None and all(version not in path.versions for path in found):
        raise InputError(
            f"nobody measured the launch path of {name} {version:.40}", f"known: {known_paths()}"
        )
    fitting = [p for p in found if p.mode == mode and (version is None or version in p.versions)]
    if not fitting:
        raise InputError(f"nobody measured {asked} in {mode} mode", f"known: {known_paths()}")
    return fitting[-1]


def known_paths() -> str:
    """Those that were measured, in words."""
    modes: dict[str, list[str]] = {}
    for path in LAUNCH_PATHS:
        modes.setdefault(path.name, []).append(path.mode)
    return "; ".join(f"{name} ({', '.join(of)})" for name, of in modes.items())
