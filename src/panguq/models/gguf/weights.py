"""Models in one GGUF file, through transformers: its blocks become plain float32 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from panguq.errors import InputError, StorageError, first_line
from panguq.extras import require
from panguq.models.checkpoint_files import CONFIG, refuse_pointer
from panguq.models.config_limits import check_sizes

SUFFIX = ".gguf"


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that is meant: `path` itself, or the only one in a folder without config.json.

    None for a folder that holds none. Raises InputError where it is not one whole file.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files or (path / CONFIG).is_file():
        return None
    if len(files) > 1:
        raise InputError(
            f"{path}: holds {len(files)} GGUF files, {files[0].name} among them",
            "give the path of one; a model that is split into several is not read",
        )
    return files[0]


def gguf_config(file: Path) -> Any:
    """The configuration that a GGUF file describes. Raises InputError, StorageError."""
    from transformers import AutoConfig, PretrainedConfig

    need("gguf")
    refuse_pointer(file)
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise StorageError(f"{file}: truncated or damaged, not a GGUF file", _AGAIN)
    try:
        where = {"gguf_file": file.name, "local_files_only": True}
        data, _ = PretrainedConfig.get_config_dict(str(file.parent), **where)
        check_sizes(data, file)  # a class may make a list of all layers
        config = AutoConfig.from_pretrained(str(file.parent), **where)
    except StorageError:
        raise
    except Exception as error:  # its readers index and unpack whatever the bytes say
        if "is not supported" in str(error):
            raise InputError(
                f"{file}: {first_line(error)[:300]}",
                "give the model as safetensors; transformers reads some GGUF architectures only",
            ) from error
        raise damaged(file, error) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_gguf(file: Path, config: Any) -> Any:
    """The model in a GGUF file, dequantized to float32 in memory.

    Raises InputError for an architecture that transformers keeps quantized, or does not read;
    StorageError, naming the file, for a damaged one.
    """
    from transformers import AutoModelForCausalLM

    need("accelerate")
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # as above
        raise damaged(file, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise StorageError(
            f"{file}: {len(missing)} weights are missing: {', '.join(missing[:4])}", _AGAIN
        )
    if any(not p.is_floating_point() for p in loaded.parameters()):
        raise InputError(
            f"{file}: transformers keeps {config.model_type} weights in GGUF's blocks",
            "give the model as safetensors",
        )
    # A model made anew is not marked as quantized, as the loaded one is all over.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    for (path, buffer), (_, whole) in zip(
        model.named_buffers(), loaded.named_buffers(), strict=True
    ):
        if buffer.is_meta:  # rotary frequencies, which are computed and not stored
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent)._buffers[name] = whole
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.eval()


def need(module: str) -> None:
    """Raises InputError where a package that reading GGUF takes is not installed."""
    require(module, "reading GGUF files", "give the model as safetensors")


def damaged(file: Path, error: Exception) -> StorageError:
    """What to raise for a file that a reader stumbled over."""
    return StorageError(
        f"{file}: truncated or damaged, cannot be read: {first_line(error)[:300]}", _AGAIN
    )


_AGAIN = "the file is incomplete; download it again"
