"""Carries a study out: in this process, by the workers of an executor, or beside others that work on it too."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console

from normfree.errors import InputError, RunFailedError
from normfree.studies.conductor import LOOK_AGAIN_SECONDS, Conductor, say
from normfree.studies.executors import Executor
from normfree.studies.plan import PlannedRun, is_finished, plan_study
from normfree.studies.schedule import Schedule
from normfree.studies.study import Study, StudyFolder
from normfree.studies.worker import WORKERS_FOLDER, Work, open_work, write_plan
from normfree.training import StudyProgress
from normfree.training.trainer import check_data

DEFAULT_RETRIES = 2


def run_study(
    study: Study,
    folder: StudyFolder,
    seeds: list[int],
    *,
    tune_lr: bool,
    cache_dir: Path,
    console: Console,
    executor: Executor | None = None,
    retries: int = DEFAULT_RETRIES,
) -> dict[str, str]:
    """Trains and measures all runs of a study (see :func:`~normfree.studies.plan.plan_study`).

    What is finished is skipped, what was stopped goes on, and what other processes work on is theirs (see
    :func:`help_with`). Without an executor the runs are trained here, one after the other. With one a run that fails
    is tried again up to ``retries`` times (see :class:`~normfree.studies.schedule.Schedule`).

    Returns:
        Why runs failed for good, by their folder below the study's. The others are finished.

    Raises:
        InputError: a configuration, the recipe, the corpus or the executor cannot be used; then the folder is not
            touched.
    """
    plan = plan_study(study, folder.preset, seeds, tune_lr=tune_lr)
    measurement = study.measurement(folder.preset) if study.measurement is not None else None
    if measurement is not None:
        measurement.check()

    def begin() -> Work:
        data = folder.prepare_data(cache_dir, progress=console.is_terminal)
        check_data(data, folder.preset.recipe)
        folder.claim(data)
        write_plan(folder, seeds, tune_lr=tune_lr, cache_dir=cache_dir)
        return Work(folder, plan, data, measurement)

    if executor is None:
        work = begin()
        schedule = _train_here(work, console, f"{study.name} ({folder.preset_name})")
    else:
        with executor:
            work = begin()
            schedule = Conductor(work, executor, console, retries).conduct(f"{study.name} ({folder.preset_name})")
    for place, planned in schedule.plan.items():
        if place in schedule.finished:
            _measure(work, planned, console)
    if not schedule.failures:
        shutil.rmtree(folder.path / WORKERS_FOLDER, ignore_errors=True)
    return schedule.failures


def help_with(path: Path, console: Console) -> dict[str, str]:
    """Trains runs of the study in ``path`` beside the process that began it, until none is left.

    Returns:
        As :func:`run_study`; a run that failed here may still be finished elsewhere.

    Raises:
        InputError: nobody is training a study there, or its tokens cannot be had.
    """
    work = open_work(path)
    return _train_here(work, console, f"helping with {work.folder.study_name}").failures


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
