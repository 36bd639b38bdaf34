"""panguq: a quantizing graph compiler for large language models on Ascend NPUs and CPUs.

```python
model = panguq.load_pretrained("path/to/model")
compiled = panguq.compile(model, "w8a8")
compiled.save("out")
compiled = panguq.load("out")
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from panguq.errors import (
    InputError,
    LoweringError,
    NumericsError,
    PanguqError,
    RecipeError,
    StorageError,
    TraceError,
    VerifyError,
)
from panguq.versions import warn_of_untested

if TYPE_CHECKING:
    from panguq.compiled_causal_lm import CompiledCausalLM
    from panguq.compiled_encoder import CompiledEncoder
    from panguq.compiled_model import load
    from panguq.compiled_module import CompiledModule
    from panguq.compiler import compile
    from panguq.data.calibration_data import read_calibration
    from panguq.evaluation import evaluate
    from panguq.models.hf import load_pretrained, load_tokenizer
    from panguq.planning.dry_run import Plan, plan
    from panguq.recipe import Recipe
    from panguq.recipe import preset_names as recipes

    __version__: str

__all__ = [
    "CompiledCausalLM",
    "CompiledEncoder",
    "CompiledModule",
    "InputError",
    "LoweringError",
    "NumericsError",
    "PanguqError",
    "Plan",
    "Recipe",
    "RecipeError",
    "StorageError",
    "TraceError",
    "VerifyError",
    "__version__",
    "compile",
    "evaluate",
    "load",
    "load_pretrained",
    "load_tokenizer",
    "plan",
    "read_calibration",
    "recipes",
]

# Loaded on first use: `import panguq` stays light, without transformers.
_LAZY = {
    "CompiledCausalLM": ("panguq.compiled_causal_lm", "CompiledCausalLM"),
    "CompiledEncoder": ("panguq.compiled_encoder", "CompiledEncoder"),
    "CompiledModule": ("panguq.compiled_module", "CompiledModule"),
    "Plan": ("panguq.planning.dry_run", "Plan"),
    "Recipe": ("panguq.recipe", "Recipe"),
    "compile": ("panguq.compiler", "compile"),
    "evaluate": ("panguq.evaluation", "evaluate"),
    "load": ("panguq.compiled_model", "load"),
    "load_pretrained": ("panguq.models.hf", "load_pretrained"),
    "load_tokenizer": ("panguq.models.hf", "load_tokenizer"),
    "plan": ("panguq.planning.dry_run", "plan"),
    "read_calibration": ("panguq.data.calibration_data", "read_calibration"),
    "recipes": ("panguq.recipe", "preset_names"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("panguq")
    if name not in _LAZY:
        raise AttributeError(f"module 'panguq' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


warn_of_untested()
