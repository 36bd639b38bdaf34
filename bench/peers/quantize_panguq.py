"""panguq under the same conditions: python -m bench.peers.quantize_panguq JOB.json

Its fake-quant graph is evaluated after the measurement in the same process, since a compiled
model is what its users run; the evaluation is the peers' own.
"""

from __future__ import annotations

from typing import Any

import panguq
from bench import accuracy_recipes
from bench.peers.job import Job, Measurement
from bench.peers.quality import float_model, quality
from panguq.evaluation import logits_of, weight_figures
from panguq.recipe import Recipe


def recipe_of(method: str, group_size: int) -> Recipe:
    """The accuracy table's recipe of the method; 4-bit weights in groups of this size."""
    if method.startswith("w8a8"):
        return Recipe.named(method)
    symmetric = method.removesuffix("-asym")
    recipe = Recipe.of(accuracy_recipes.recipe_of(f"w4a16-{symmetric}"))
    return recipe.with_schemes({"*": f"W4A16-g{group_size}{method.removeprefix(symmetric)}"})


def main() -> None:
    """Compile for the CPU, lowering included, then evaluate."""
    job = Job.from_command_line()
    measurement = Measurement(job, ("panguq",))
    recipe, windows = recipe_of(job.method, job.group_size), job.windows()
    model = measurement.load(lambda: panguq.load_pretrained(job.model))
    options: dict[str, Any] = {"recipe": recipe.to_data()}

    def quantize() -> Any:
        return panguq.compile(model, recipe, calibration=windows, progress=lambda *_: None)

    compiled = measurement.quantize(quantize, options)
    fake_quant = logits_of(compiled.at_stage("fake-quant"))
    measurement.figures |= quality(fake_quant, float_model(job.model), job.tokens)
    measurement.figures["bits_per_weight"] = weight_figures(compiled)["bits_per_weight"]
    measurement.write()


if __name__ == "__main__":
    main()
