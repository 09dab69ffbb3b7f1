"""Carries a study out: in this process, by the workers of an executor, or beside others that work on it too."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from normfree.errors import InputError, RunFailedError
from normfree.locks import sweep
from normfree.runner.conductor import LOOK_AGAIN_SECONDS, Conductor, say
from normfree.runner.executors import Executor
from normfree.runner.plan import PlannedRun, is_finished, plan_study
from normfree.runner.schedule import Schedule
from normfree.runner.study import Study, StudyFolder
from normfree.runner.worker import WORKERS_FOLDER, Work, open_work, write_plan
from normfree.training import StudyProgress
from normfree.training.trainer import check_data

DEFAULT_RETRIES = 2


@dataclass(frozen=True)
class Execution:
    """How a study is carried out, whichever it is.

    cache_dir: where tokenized corpora are kept and found again.
    seeds: None for those of the preset.
    tune_lr: whether each configuration is also trained at multiples of the recipe's learning rate (see
        :func:`~normfree.runner.plan.plan_study`).
    only: the labels of the configurations to train, beside the baseline; None for all.
    executor: who trains; None for this process, one run after the other.
    retries: how often a run that failed on an executor is tried again.
    """

    console: Console
    cache_dir: Path
    seeds: list[int] | None = None
    tune_lr: bool = False
    only: tuple[str, ...] | None = None
    executor: Executor | None = None
    retries: int = DEFAULT_RETRIES


def train_study(study: Study, folder: StudyFolder, execution: Execution) -> dict[str, str]:
    """Trains and measures all runs of a study (see :func:`~normfree.runner.plan.plan_study`).

    What is finished is skipped, what was stopped goes on, and what other processes work on is theirs (see
    :func:`help_with`). What becomes of a run that fails, :class:`~normfree.runner.schedule.Schedule` says.

    Returns:
        Why runs failed for good, by their folder below the study's. The others are finished.

    Raises:
        InputError: a configuration, the recipe, the corpus or the executor cannot be used; then the folder is not
            touched.
    """
    console, seeds = execution.console, execution.seeds or folder.preset.seeds
    title = f"{study.name} ({folder.preset_name})"
    tune_lr, only = execution.tune_lr, execution.only
    plan = plan_study(study, folder.preset, seeds, tune_lr=tune_lr, only=only)
    measurement = study.measurement(folder.preset) if study.measurement is not None else None
    if measurement is not None:
        measurement.check()

    def begin() -> Work:
        data = folder.prepare_data(execution.cache_dir, progress=console.is_terminal)
        check_data(data, folder.preset.recipe)
        folder.claim(data)
        write_plan(folder, seeds, tune_lr=tune_lr, only=only, cache_dir=execution.cache_dir)
        return Work(folder, plan, data, measurement)

    if execution.executor is None:
        work = begin()
        schedule = _train_here(work, console, title)
    else:
        with execution.executor:
            work = begin()
            schedule = Conductor(work, execution.executor, console, execution.retries).conduct(title)
    for place, planned in schedule.plan.items():
        if place in schedule.finished:
            sweep(folder.path / place)
            _measure(work, planned, console)
    if not schedule.failures:
        shutil.rmtree(folder.path / WORKERS_FOLDER, ignore_errors=True)
    return schedule.failures


def help_with(path: Path, console: Console, study: str | Path | None = None) -> dict[str, str]:
    """Trains runs of the study in ``path`` beside the process that began it, until none is left.

    A ``study`` in a user's file has to be named, as for :func:`normfree.runner.load_study`.

    Returns:
        As :func:`train_study`; a run that failed here may still be finished elsewhere.

    Raises:
        InputError: nobody is training a study there, or its tokens cannot be had.
    """
    work = open_work(path, study)
    return _train_here(work, console, f"helping with {work.folder.study_name}").failures


def told(failures: Mapping[str, str]) -> str:
    """Which runs of a study failed, and why."""
    n = len(failures)
    return f"{n} run{'s' if n > 1 else ''} failed: " + "; ".join(f"{run} ({why})" for run, why in failures.items())


def _train_here(work: Work, console: Console, description: str) -> Schedule:
    """Trains what is ready and free, until every run is finished or has failed.

    A run that failed is not tried again: this process is the same.
    """
    schedule = Schedule(work.plan, retries=0)
    said: set[str] = set()
    with StudyProgress(sum(each.n_tokens for each in work.plan), console=console, description=description) as progress:
        while not schedule.is_over:
            if not any(_train(planned, work, schedule, progress, said) for planned in schedule.ready()):
                time.sleep(LOOK_AGAIN_SECONDS)
    return schedule


def _train(planned: PlannedRun, work: Work, schedule: Schedule, progress: StudyProgress, said: set[str]) -> bool:
    """Brings one run to its end, if no other process has it."""
    if is_finished(planned, work.folder):
        progress.skip(planned.n_tokens)
        schedule.finish(planned.place)
        return True
    holder = work.holder(planned)
    if holder is None:
        try:
            work.train(planned, progress.run(planned.label, planned.n_tokens))
            schedule.finish(planned.place)
            return True
        except RunFailedError as error:
            schedule.fail(planned.place, str(error))
            say(progress.console, f"{planned.label} failed: {error}")
            return True
        except InputError:
            holder = work.holder(planned)
            if holder is None:
                raise
    if planned.place not in said:
        said.add(planned.place)
        say(progress.console, f"{planned.label} is left to another process: {holder}")
    return False


def _measure(work: Work, planned: PlannedRun, console: Console) -> None:
    """What has been measured already is not measured again."""
    if work.measurement is None:
        return
    while work.holder(planned) is not None:
        time.sleep(LOOK_AGAIN_SECONDS)
    work.measure(planned, console)
