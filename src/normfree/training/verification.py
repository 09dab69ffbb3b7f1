"""Checks a finished run: its files, the consistency of its numbers, and its loss, measured again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normfree.columns import ENTROPY_NATS, EVAL_LOSS, EVAL_PPL, LOSS_NATS, TRAIN_LOSS
from normfree.data import PackedData, same_data
from normfree.devices import on_device
from normfree.errors import InputError
from normfree.training.evaluation import evaluation_losses
from normfree.training.half_precision import autocast, float32_accumulation
from normfree.training.pretrained import load_pretrained
from normfree.training.records import LAYERS_FILE, METRICS_FILE, read_parquet
from normfree.training.result import RunResult, load_result
from normfree.training.run_config import RunConfig, load_run_config
from normfree.training.run_folder import (
    CONFIG_FILE,
    MANIFEST_FILE,
    RESULTS_FILE,
    checkpoints,
    damage,
    recorded,
    step_of,
)

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Most nats by which a sequence's loss may differ when it is measured again, by precision.

Another machine adds in another order.
"""


@dataclass
class Verification:
    """The result for one run folder, which holds if there are no ``problems``.

    unchecked: what could not be checked, and why.
    """

    folder: Path
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.problems


def verify_run(folder: Path, cache_dir: Path, *, evaluate: bool = True, device: str | None = None) -> Verification:
    """Checks the finished run in ``folder``; its loss on ``device``, as of :func:`load_pretrained`.

    Every checkpoint is whole (SHA-256 of its files); configuration and results agree; the telemetry has every row that
    the recipe asks for, none twice, and finite losses unless the run diverged; the loss in ``results.csv`` is the mean
    of ``sequence_losses.parquet``; and, with ``evaluate``, the last checkpoint has that loss on every sequence, within
    :data:`TOLERANCE`.

    Raises:
        InputError: there is no run in ``folder``, or its tokens are no longer available.
    """
    found = Verification(folder)
    run = load_run_config(folder / CONFIG_FILE)
    _check_checkpoints(found, run)
    try:
        result = load_result(folder)
        _check_result(found, run, result)
        _check_metrics(found, run, result)
        _check_layers(found, run)
    except InputError as error:
        found.problems.append(str(error))
        return found
    if evaluate:
        with on_device(device):
            _check_loss(found, run, result, cache_dir)
    return found


def run_folders(folder: Path) -> list[Path]:
    """The finished runs in ``folder``, a run or a study of any depth.

    Raises:
        InputError: there are none.
    """
    found = sorted(path.parent for path in folder.rglob(CONFIG_FILE) if (path.parent / RESULTS_FILE).exists())
    if not found:
        raise InputError(
            f"{folder} holds no finished run (a folder with {CONFIG_FILE} and {RESULTS_FILE}); give the folder of a "
            "run or of a study"
        )
    return found


def _check_checkpoints(found: Verification, run: RunConfig) -> None:
    there = checkpoints(found.folder)
    for checkpoint in there:
        problem = damage(checkpoint)
        if problem is not None:
            found.problems.append(f"{checkpoint.name}: {problem}")
        elif not (checkpoint / MANIFEST_FILE).exists():
            found.unchecked.append(f"{checkpoint.name} has no {MANIFEST_FILE}, and so no hashes")
    if not there:
        found.problems.append("there is no checkpoint")


def _check_result(found: Verification, run: RunConfig, result: RunResult) -> None:
    length = run.data.sequence_length
    expected = {
        "model": run.model_name,
        "configuration": run.configuration,
        "seed": run.seed,
        "learning_rate": run.recipe.learning_rate,
        "context_length": length,
        "steps": run.recipe.n_steps(length),
        "tokens": run.recipe.n_tokens(length),
        "eval_sequences": len(result.sequence_losses),
    }
    for name, value in expected.items():
        if name not in result.row or str(result.row[name]) != str(value):
            found.problems.append(
                f"{RESULTS_FILE}: {name} is {result.row.get(name)!r}, and {value!r} by the configuration and the losses"
            )
    if result.row.get("status") not in ("finished", "diverged"):
        found.problems.append(f"{RESULTS_FILE}: unknown status {result.row.get('status')!r}")
    loss, ppl = float(result.row.get(EVAL_LOSS, math.nan)), float(result.row.get(EVAL_PPL, math.nan))
    if math.isfinite(loss) and not math.isclose(ppl, math.exp(loss), rel_tol=1e-9):
        found.problems.append(f"{RESULTS_FILE}: eval_ppl is {ppl}, and exp(eval_loss) {math.exp(loss)}")
    if run.data.corpus.startswith("pairs:"):
        return  # the mean is weighted with the tokens of each sequence: _check_loss has them
    mean = float(result.sequence_losses[LOSS_NATS].to_numpy().mean())
    if not _same(loss, mean, 1e-9):
        found.problems.append(f"{RESULTS_FILE}: eval_loss is {loss}, and the mean of the sequences' losses {mean}")


def _check_metrics(found: Verification, run: RunConfig, result: RunResult) -> None:
    metrics = read_parquet(found.folder / METRICS_FILE)
    n_twice = int(metrics.duplicated(["step", "name"]).sum())
    if n_twice:
        found.problems.append(f"{METRICS_FILE}: {n_twice} rows are there twice")
    steps, recipe = run.recipe.n_steps(run.data.sequence_length), run.recipe
    expected = {
        TRAIN_LOSS: set(range(recipe.logging_steps, steps + 1, recipe.logging_steps)),
        EVAL_LOSS: {*range(recipe.eval_steps, steps + 1, recipe.eval_steps), steps},
    }
    for name, at in expected.items():
        rows = metrics[metrics["name"] == name]
        _check_steps(found, METRICS_FILE, name, set(rows["step"]), at)
        n_bad = int((~np.isfinite(rows["value"])).sum())
        # In fp16 a step that overflows is skipped: it is no divergence.
        if n_bad and result.row.get("status") == "finished" and recipe.precision != "fp16":
            found.problems.append(f"{METRICS_FILE}: {n_bad} values of {name} are not finite, and the run is finished")
    if not metrics["wall_seconds"].is_monotonic_increasing:
        found.problems.append(f"{METRICS_FILE}: wall_seconds goes back")


def _check_layers(found: Verification, run: RunConfig) -> None:
    layers = read_parquet(found.folder / LAYERS_FILE)
    n_twice = int(layers.duplicated(["step", "layer", "head", "name"]).sum())
    if n_twice:
        found.problems.append(f"{LAYERS_FILE}: {n_twice} rows are there twice")
    entropy = layers[layers["name"] == ENTROPY_NATS]
    steps = run.recipe.n_steps(run.data.sequence_length)
    _check_steps(
        found, LAYERS_FILE, ENTROPY_NATS, set(entropy["step"]), set(range(0, steps, run.recipe.telemetry_steps))
    )
    counts = entropy.groupby("step").size()
    if counts.nunique() > 1:
        few = counts[counts != counts.max()]
        found.problems.append(f"{LAYERS_FILE}: step {few.index[0]} has {few.iloc[0]} heads, others {counts.max()}")


def _check_steps(found: Verification, file: str, name: str, there: set[int], expected: set[int]) -> None:
    missing, unexpected = sorted(expected - there), sorted(there - expected)
    if missing:
        found.problems.append(f"{file}: {name} is missing at {len(missing)} steps, {missing[0]} first")
    if unexpected:
        found.problems.append(f"{file}: {name} is there at {len(unexpected)} steps too many, {unexpected[0]} first")


def _check_loss(found: Verification, run: RunConfig, result: RunResult, cache_dir: Path) -> None:
    steps = run.recipe.n_steps(run.data.sequence_length)
    whole = [each for each in checkpoints(found.folder) if damage(each) is None]
    if result.row.get("status") == "diverged":
        found.unchecked.append("the run diverged: its final weights are in no checkpoint to measure again")
        return
    if not whole or step_of(whole[-1]) != steps:
        found.problems.append(f"there is no whole checkpoint of the last step, {steps}, to measure again")
        return
    fingerprint = recorded(found.folder / CONFIG_FILE, "corpus_fingerprint")
    if fingerprint is None:
        found.problems.append(f"{CONFIG_FILE} does not say which tokens the run was trained on (provenance)")
        return
    data = same_data(run.data, cache_dir, fingerprint)
    losses = _losses(run, data, whole[-1])
    n_predicted = data.eval.n_predicted()
    losses, weights = losses[n_predicted > 0], n_predicted[n_predicted > 0]
    stored = result.sequence_losses[LOSS_NATS].to_numpy()
    if len(losses) != len(stored):
        found.problems.append(f"{len(stored)} sequences were measured, and the data have {len(losses)}")
        return
    tolerance = TOLERANCE[run.recipe.precision]
    furthest = float(np.abs(losses - stored).max())
    if not furthest <= tolerance:
        found.problems.append(
            f"{whole[-1].name} has another loss than was stored: up to {furthest:.2g} nats on a sequence, and "
            f"{tolerance:g} may be rounding"
        )
    mean, loss = float(np.average(stored, weights=weights)), float(result.row[EVAL_LOSS])
    if not _same(loss, mean, 1e-9):
        found.problems.append(f"{RESULTS_FILE}: eval_loss is {loss}, and the mean of the sequences' losses {mean}")


def _losses(run: RunConfig, data: PackedData, checkpoint: Path) -> NDArray[np.float64]:
    """The loss of each evaluation sequence in the run's own precision and batches: float64 [n]."""
    model = load_pretrained(str(checkpoint)).as_normfree()
    model.set_attn_implementation(run.recipe.attn_implementation)
    precision, (tokens, labels) = run.recipe.precision, data.eval.whole()
    with float32_accumulation(precision, model.device), autocast(precision, model.device):
        return evaluation_losses(model, tokens, run.recipe.micro_batch_size, labels=labels)


def _same(first: float, second: float, tolerance: float) -> bool:
    return math.isclose(first, second, rel_tol=tolerance) or (math.isnan(first) and math.isnan(second))
