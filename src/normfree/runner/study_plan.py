"""What a study will take, before it begins: ``normfree study NAME --plan``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from normfree.data import load_tokenizer, vocabulary_size
from normfree.devices import on_device
from normfree.progress import stage
from normfree.runner.catalog import find_study
from normfree.runner.opening import begin
from normfree.runner.result import checked_seeds
from normfree.runner.run_order import PlannedRun, planned_runs
from normfree.training import RunConfig, load_pretrained
from normfree.training.training_plan import TrainingPlan, planned_model, seconds_a_step, trial_model


def plan_study(
    name: str | Path,
    preset: str | Path = "cpu",
    *,
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    only: Sequence[str] | None = None,
    tune_lr: bool = False,
    device: str | None = None,
    timed: bool = True,
) -> pd.DataFrame:
    """What :func:`~normfree.runner.run_study` with these arguments trains. Writes nothing and reads no corpus.

    Args:
        name, preset, seeds, out, changes, only, tune_lr, device: as for :func:`~normfree.runner.run_study`.
        timed: try a micro-batch of each configuration, on random tokens.

    Returns:
        A row for each study, group (runs, sweep, tuned) and configuration: study, group, configuration, n_run, steps,
        tokens (of a run), parameters, memory_bytes (estimated), and seconds of training of all its runs, one after the
        other, evaluation and telemetry not counted; NaN if it is not ``timed``.

    Raises:
        InputError: as :func:`~normfree.runner.run_study`, or a tokenizer that decides the vocabulary cannot be loaded.
    """
    found = find_study(name)
    folder = Path(out) if out is not None else Path("studies") / f"{found.study.name}-{Path(preset).stem}"
    begun = begin(found, folder, str(preset), lambda each: each.with_changes(**(changes or {})))
    rows = []
    for member, labels in begun.chosen(tuple(only) if only else None):
        chosen = checked_seeds(seeds) or member.folder.preset.seeds
        runs = planned_runs(member.study, member.folder.preset, chosen, tune_lr=tune_lr, only=labels)
        with on_device(device):
            rows += list(_rows(member.study.name, runs, timed))
    return pd.DataFrame(rows)


def _rows(study: str, runs: Sequence[PlannedRun], timed: bool) -> Iterator[dict[str, Any]]:
    of_configuration: dict[tuple[str, str], list[PlannedRun]] = {}
    for each in runs:
        of_configuration.setdefault((each.group, each.run.configuration), []).append(each)
    seconds: dict[str, float] = {}
    for (group, configuration), same in of_configuration.items():
        run = same[0].run
        plan = _plan(run)
        if timed and configuration not in seconds:
            with stage(f"trying a step of {configuration}"):
                seconds[configuration] = _seconds_a_step(run)
        yield {
            "study": study,
            "group": group,
            "configuration": configuration,
            "n_run": len(same),
            "steps": plan.steps,
            "tokens": plan.tokens,
            "parameters": plan.parameters,
            "memory_bytes": plan.memory_bytes,
            "seconds": seconds.get(configuration, float("nan")) * plan.steps * len(same),
        }


def _plan(run: RunConfig) -> TrainingPlan:
    if run.start_from is not None:
        model = load_pretrained(run.start_from, dtype="fp32").as_normfree()
    else:
        model = planned_model(run.build_model_config(_vocab_size(run)))
    return TrainingPlan.of(run.recipe, run.data.sequence_length, model)


def _seconds_a_step(run: RunConfig) -> float:
    if run.start_from is not None:
        model = load_pretrained(run.start_from, dtype="fp32").as_normfree()
    else:
        model = trial_model(run.build_model_config(_vocab_size(run)))
    model.set_attn_implementation(run.recipe.attn_implementation)
    return seconds_a_step(run.recipe, run.data.sequence_length, model)


def _vocab_size(run: RunConfig) -> int:
    if run.data.tokenizer == "train":
        return run.data.vocab_size
    return vocabulary_size(load_tokenizer(run.data.tokenizer))
