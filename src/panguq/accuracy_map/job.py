"""What a cell of the map is before it is measured: a recipe, a task, what else changes figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from panguq.errors import InputError
from panguq.files.checksums import sha256_of
from panguq.files.plain_yaml import parse_yaml
from panguq.models.openpangu.chat import Thinking
from panguq.recipe import Recipe
from panguq.tasks.language_model import Decoding

FLOAT = "float"
_HASHED = (".safetensors", ".gguf", ".bin")
_SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Job:
    """One cell to be. `recipe` is its name and `recipe_text` all of it; the model itself is the
    recipe `float`, without text. The rest is what `panguq map` was told."""

    model: str
    model_sha256: str
    recipe: str
    recipe_text: str
    task: str
    protocol: str
    data: str | None
    target: str = "cpu"
    calibration: str | None = None
    calibration_sha256: str = ""
    windows: int = 16
    window: int = 512
    sampled: int = 0
    limit: int | None = None
    seed: int = 0
    thinking: Thinking | None = None
    budget: int = 256
    temperature: float = 0.0
    samples: int = 1
    batch: int = 8
    unsafe: bool = False
    command: str = ""

    @property
    def is_float(self) -> bool:
        """Whether it is the source model that answers."""
        return not self.recipe_text

    @property
    def float_job(self) -> Job:
        """The cell that this one is compared with."""
        return replace(
            self, recipe=FLOAT, recipe_text="", target="cpu", calibration=None,
            calibration_sha256="", windows=0, window=0, sampled=0,
        )  # fmt: skip

    @property
    def decoding(self) -> Decoding:
        """How answers are generated."""
        return Decoding(
            self.budget, self.temperature, self.samples, self.seed, self.batch, self.thinking
        )

    @property
    def compiled_recipe(self) -> Recipe:
        """The recipe that its text spells."""
        data = parse_yaml(self.recipe_text, self.recipe)
        assert isinstance(data, Mapping)  # a recipe wrote it
        return Recipe.of(data)

    @property
    def recipe_key(self) -> str:
        """Names the compiled model: 12 hex digits of all that it is made of."""
        return _digest(
            self.model_sha256, self.recipe_text, self.target, self.calibration_sha256,
            self.windows, self.window, self.sampled, self.seed,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """Names the cell's files, to be read and to be unique."""
        key = _digest(
            self.recipe_key, self.task, self.protocol, self.limit, self.seed, self.thinking
        )
        mode = f"-{self.thinking}" if self.thinking else ""
        return f"{self.recipe}.{self.task}{mode}.{key}"

    def as_json(self) -> dict[str, Any]:
        """For a worker in another process."""
        return asdict(self)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def model_hash(path: Path) -> str:
    """The sha256 of a model: of its weights', config's and tokenizer's checksums by name.

    path: a model folder, or a .gguf file. Raises InputError for one without weights.
    """
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    found = [f for f in files if f.suffix in _HASHED or f.name in _SMALL]
    if not any(f.suffix in _HASHED for f in found):
        raise InputError(f"{path}: holds no weights", "give a model folder, or a .gguf file")
    lines = [f"{sha256_of(file.resolve())}  {file.name}\n" for file in found]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
