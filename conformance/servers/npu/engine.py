"""One folder in vllm-ascend's platform, quantization config, layers and weight loader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


@dataclass
class Process:
    """This process's place among those that share a model."""

    rank: int = 0
    world: int = 1
    port: int = 29600
    is_ready: bool = False

    def prepare(self, config: Any) -> None:
        """Start torch.distributed and register the server's layers, once in a process."""
        if self.is_ready:
            return
        import vllm_ascend.ops.register_custom_ops  # noqa: F401
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm_ascend.ascend_config import get_ascend_config
        from vllm_ascend.distributed.parallel_state import init_ascend_model_parallel
        from vllm_ascend.utils import register_ascend_customop, set_weight_prefetch_method

        address = f"tcp://127.0.0.1:{self.port}"
        init_distributed_environment(self.world, self.rank, address, self.rank, "gloo")
        initialize_model_parallel(self.world, 1)
        init_ascend_model_parallel(config.parallel_config)
        register_ascend_customop(config)
        set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
        self.is_ready = True


@dataclass
class Placed:
    """Where the tensors of a checkpoint went, each of them given to the loader alone."""

    tensors: int = 0
    parameters: int = 0
    left_over: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    lossy: Counter[str] = field(default_factory=Counter)
    """Tensors that do not survive the conversion to their parameter's dtype, by name's end."""


@contextmanager
def server_config(folder: Path, dtype: str, quantization: str, process: Process) -> Iterator[Any]:
    """vLLM's config for a folder, set as the current one, for CPU tensors."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(folder),
        quantization=None if quantization == "auto" else quantization,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        load_format="safetensors",
    )
    config = arguments.create_engine_config()
    config.parallel_config.tensor_parallel_size = process.world
    config.parallel_config.world_size = process.world
    config.parallel_config.rank = process.rank
    config.device_config.device = torch.device("cpu")
    config.device_config.device_type = "cpu"
    with set_current_vllm_config(config):
        process.prepare(config)
        yield config


def build(config: Any) -> nn.Module:
    """The server's model with parameters that nothing was loaded into."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        model: nn.Module = initialize_model(config)
    return model


def schemes(model: nn.Module) -> dict[str, int]:
    """How many layers have which class of layer and scheme."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            scheme = getattr(method, "quant_method", method)
            found[f"{type(module).__name__}: {type(scheme).__name__}"] += 1
    return dict(found)


def place(model: nn.Module, folder: Path) -> Placed:
    """Give the loader every tensor of the checkpoint by itself and see where it goes."""
    parameters = dict(model.named_parameters())
    placed = Placed(parameters=len(parameters))
    loaded: set[str] = set()
    for name, tensor in _tensors(folder):
        placed.tensors += 1
        try:
            reached = model.load_weights(iter([(name, tensor)]))
        except Exception as error:  # whatever a loader raises is the answer
            placed.refused.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if not reached:
            placed.left_over.append(name)
        loaded |= set(reached)
        for parameter in reached:
            dtype = parameters[parameter].dtype
            if dtype != tensor.dtype and not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
                placed.lossy[name.rpartition(".")[2]] += 1
    placed.missing = sorted(set(parameters) - loaded)
    return placed


def load(model: nn.Module, config: Any) -> None:
    """The whole folder by the server's own loader, and its processing of weights afterwards."""
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    for parameter in model.parameters():
        parameter.data.fill_(0)
    get_model_loader(config.load_config).load_weights(model, config.model_config)
    process_weights_after_loading(model, config.model_config, torch.device("cpu"))


def logits(model: nn.Module, config: Any, ids: Tensor) -> Tensor:
    """`[sequences, tokens, vocabulary]` in float32 for `ids` `[sequences, tokens]`."""
    from vllm_ascend.ascend_forward_context import set_ascend_forward_context

    size = config.model_config.hf_config.vocab_size
    rows = []
    with torch.no_grad():
        for row in ids:
            with set_ascend_forward_context(None, config, len(row), model_instance=model):
                hidden = model(row, torch.arange(len(row)), None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            rows.append(nn.functional.linear(hidden, _head(model))[:, :size].float())
    return torch.stack(rows)


def _head(model: nn.Module) -> Tensor:
    """The LM head's weight `[vocabulary, hidden]`, all ranks' shares of it."""
    from vllm.distributed import tensor_model_parallel_all_gather

    weight: Tensor = model.lm_head.weight
    return tensor_model_parallel_all_gather(weight, 0)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                yield name, opened.get_tensor(name)
