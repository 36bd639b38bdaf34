"""One cell: compile or load, answer, compare with float's cell, say the status."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from panguq.accuracy_map.folder import ATTEMPTS, Cell, MapFolder
from panguq.accuracy_map.job import Job
from panguq.errors import NumericsError, PanguqError, StorageError
from panguq.tasks.answers import longest_sequence
from panguq.tasks.fidelity import broken_matmul, fidelity, prompt_ids
from panguq.tasks.find_task import find_task
from panguq.tasks.outcome import (
    Prepared,
    TaskOutcome,
    evaluate_task,
    of_json,
    prepare_task,
    token_windows_of,
)
from panguq.tasks.verdict import compared, item_figures, status_of

logger = logging.getLogger("panguq")


class RecipeRefused(PanguqError):
    """No compiled model of a recipe: `status` says which kind of a reason `message` is."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Models:
    """The float model, and the compiled model of one recipe at a time."""

    def __init__(self, folder: MapFolder) -> None:
        self.folder = folder
        self._float: Any = None
        self._compiled: tuple[str, Any] = ("", None)
        self.tokenizer: Any = None

    def float_model(self, job: Job) -> Any:
        """The source model."""
        if self._float is None:
            from panguq.models.hf import load_pretrained, load_tokenizer

            self.tokenizer = load_tokenizer(job.model)
            self._float = load_pretrained(job.model)
        return self._float

    def of(self, job: Job) -> Any:
        """What answers in a cell. Raises RecipeRefused where the recipe gives no model."""
        float_model = self.float_model(job)
        if job.is_float:
            return float_model
        if self._compiled[0] != job.recipe_key:
            self._compiled = ("", None)  # the old one's memory, before the new one's
            self._compiled = (job.recipe_key, self._made(job, float_model))
        return self._compiled[1]

    def _made(self, job: Job, float_model: Any) -> Any:
        from panguq.compiled_model import load

        with self.folder.lock(f"compiled-{job.recipe_key}", wait=True):
            refusal = self.folder.refusal(job)
            if refusal is not None:
                raise RecipeRefused(refusal["status"], refusal["reason"])
            path = self.folder.compiled_path(job)
            if path.exists():
                return load(path)
            try:
                return self._compile(job, float_model, path)
            except StorageError:
                raise
            except PanguqError as error:
                status = "non-finite" if isinstance(error, NumericsError) else "refused"
                self.folder.refuse(job, status, error.message)
                raise RecipeRefused(status, error.message) from error

    def _compile(self, job: Job, float_model: Any, path: Path) -> Any:
        from panguq.compiler import compile
        from panguq.data.calibration_data import read_calibration

        calibration = None
        if job.calibration is not None:
            calibration = read_calibration(job.calibration, self.tokenizer, job.window, job.windows)
        started = time.perf_counter()
        compiled = compile(
            float_model,
            job.compiled_recipe,
            calibration=calibration,
            sampled=job.sampled,
            tokenizer=self.tokenizer,
            target=job.target,
            seed=job.seed,
            allow_unmatched=True,
            progress=lambda *_: None,
        )
        logger.info("%s compiled in %.0f s", job.recipe, time.perf_counter() - started)
        compiled.save(path)
        return compiled


def make_cell(folder: MapFolder, job: Job, models: Models, order: int) -> Cell:
    """Measure a cell and write it; whatever fails is written as the cell's result.

    Raises StorageError where the folder cannot be written, and KeyboardInterrupt.
    """
    before = folder.begin(job.name)
    try:
        return _make_cell(folder, job, models, order, before)
    except (KeyboardInterrupt, StorageError):  # the cell is not to blame
        folder.forget_attempts(job.name)
        raise


def _make_cell(folder: MapFolder, job: Job, models: Models, order: int, before: int) -> Cell:
    cell: Cell = {
        "name": job.name, "order": order, "model": job.model_sha256[:16], "recipe": job.recipe,
        "task": job.task, "protocol": job.protocol, "seed": job.seed, "limit": job.limit,
        "thinking": job.thinking, "samples": job.samples, "temperature": job.temperature,
        "target": job.target, "command": job.command,
    }  # fmt: skip
    items: list[Any] = []
    with logged(folder.log_file(job.name)):
        started = time.perf_counter()
        reset_peak()
        try:
            if before >= ATTEMPTS:
                raise PanguqError(f"its process died {before} times, of too little memory perhaps")
            found, items = _measured(folder, job, models)
            cell |= found
        except StorageError as error:
            if str(folder.path) in error.message:
                raise
            cell |= {"status": "failed", "reason": error.message}
        except RecipeRefused as error:
            cell |= {"status": error.status, "reason": error.message}
        except PanguqError as error:
            cell |= {"status": "failed", "reason": f"{error.message}. {error.hint}".strip(". ")}
        except Exception as error:  # a fault of a library's, or of panguq's: others go on
            logger.error("%s", traceback.format_exc())
            cell |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
        cell.setdefault("seconds", round(time.perf_counter() - started, 3))
        cell |= {"peak_mib": peak_mib(), "finished": round(time.time())}
    folder.finish(job.name, cell, items)
    return cell


def _measured(folder: MapFolder, job: Job, models: Models) -> tuple[Cell, list[Any]]:
    from panguq.evaluation import weight_figures

    data = None if job.data is None else Path(job.data)
    task = find_task(job.task, data)
    prepared = prepare_task(task, data, job.limit, job.decoding)
    model = models.of(job)
    started = time.perf_counter()
    outcome = evaluate_task(
        prepared, model, models.tokenizer, job.decoding, job.limit, unsafe=job.unsafe
    )
    cell: Cell = {
        **item_figures(task, outcome.items),
        "all_items": outcome.total,
        "kind": task.kind,
    }
    if job.is_float:
        bits = 8.0 * models.float_model(job).dtype.itemsize
        cell |= {"float_value": cell["value"], "difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
        cell |= {"kl": 0.0, "top1": 1.0, "right_to_wrong": 0, "wrong_to_right": 0}
        cell |= {"bits_per_weight": bits, "status": "ok", "reason": "the model itself"}
        if not math.isfinite(cell["value"]):
            cell |= {"status": "non-finite", "reason": "the value is not finite"}
    else:
        cell |= _against_float(folder, job, models, prepared, outcome, cell)
        cell["bits_per_weight"] = weight_figures(model)["bits_per_weight"]
    cell["seconds"] = round(time.perf_counter() - started, 3)
    return cell, outcome.as_json()


def _against_float(
    folder: MapFolder, job: Job, models: Models, prepared: Prepared, outcome: TaskOutcome, own: Cell
) -> Cell:
    task, floats = prepared.task, folder.cell(job.float_job)
    before = of_json(folder.items(job.float_job.name))
    if not before:
        raise PanguqError(f"float has no figures for the task: {floats.get('reason')}")
    cell = {**own, **compared(task, before, outcome.items)}
    model = models.of(job)
    near = fidelity(models.float_model(job), model, _prompts(job, models, prepared, outcome, model))
    cell |= {"kl": near.kl, "top1": near.top1, "kl_tokens": near.tokens, "broken": near.broken}
    if task.is_generated and floats.get("tokens_mean"):
        cell["inflation"] = cell["tokens_mean"] / floats["tokens_mean"]
    matmul = broken_matmul(model)
    cell["status"], cell["reason"] = status_of(task, cell, floats, matmul)
    if cell["status"] not in ("ok", "degraded"):
        cell["first_broken"] = near.broken or matmul
    return cell


def _prompts(job: Job, models: Models, prepared: Prepared, outcome: TaskOutcome, model: Any) -> Any:
    if prepared.task.kind != "perplexity":
        return prompt_ids(models.tokenizer, outcome.prompts, longest_sequence(model))
    longest = longest_sequence(model) or 512
    windows, _ = token_windows_of(prepared.text, models.tokenizer, longest, job.limit, job.seed)
    return list(windows)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """What panguq's logger says meanwhile goes into a file, beside where it goes anyway."""
    handler = logging.FileHandler(path, mode="a", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, spread = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = spread
        handler.close()


def reset_peak() -> None:
    """Begin to measure the peak of resident memory anew, where the kernel can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> int | None:
    """The peak of resident memory since `reset_peak`, in MiB."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return None
