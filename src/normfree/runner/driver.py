"""Drives the runs of a study: starts them on an executor and collects their outcomes."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from normfree.columns import EVAL_LOSS
from normfree.locks import sweep
from normfree.progress import display, shown_on
from normfree.runner.execution import Execution
from normfree.runner.executors import Executor, Job, Task, ThisProcess
from normfree.runner.run_order import PlannedRun, is_finished, planned_runs, to_train
from normfree.runner.run_queue import RunQueue
from normfree.runner.study import Study
from normfree.runner.study_folder import StudyFolder
from normfree.runner.work import (
    WORKERS_FOLDER,
    Report,
    State,
    Work,
    last_step,
    measurement_of,
    open_work,
    read_report,
    write_plan,
)
from normfree.training import StudyProgress, load_result
from normfree.training.loop import check_data
from normfree.training.run_folder import checkpoints, step_of

LOOK_AGAIN_SECONDS = 10.0
"""Wait before a run that another process has is checked again."""


def train_study(study: Study, folder: StudyFolder, execution: Execution) -> dict[str, str]:
    """Trains and measures all runs of a study (see :func:`~normfree.runner.run_order.planned_runs`).

    Finished runs are skipped, stopped ones resume, and runs that other processes train are left to them (see
    :func:`help_with`). :class:`~normfree.runner.run_queue.RunQueue` decides what follows a failure.

    Returns:
        Reasons of the runs that failed permanently, by their folder below the study's. The others are finished.

    Raises:
        InputError: a configuration, the recipe, the corpus or the executor cannot be used; then the folder is not
            touched.
    """
    console, seeds = execution.console, execution.seeds or folder.preset.seeds
    tune_lr, only = execution.tune_lr, execution.only
    runs = planned_runs(study, folder.preset, seeds, tune_lr=tune_lr, only=only)
    measurement = measurement_of(study, folder)
    if measurement is not None:
        measurement.check()
    with execution.executor or nullcontext():
        data = folder.prepare_data(execution.cache_dir)
        check_data(data, folder.preset.recipe)
        folder.claim(data)
        if not all(is_finished(each, folder) for each in runs):
            folder.keep_command(execution.command)
        device, cache_dir = execution.device, execution.cache_dir
        write_plan(folder, seeds, tune_lr=tune_lr, only=only, cache_dir=cache_dir, device=device)
        work = Work(folder, runs, data, measurement, device)
        title = f"{study.name} ({folder.preset_name})"
        queue = _drive(work, title, executor=execution.executor, retries=execution.retries)
    for planned in runs:
        if planned.place in queue.finished:
            sweep(folder.path / planned.place)
            _measure(work, planned, console)
    if not queue.failures:
        shutil.rmtree(folder.path / WORKERS_FOLDER, ignore_errors=True)
    return queue.failures


def help_with(path: Path, console: Console, study: str | Path | None = None) -> dict[str, str]:
    """Trains runs of the study in ``path`` next to the process that began it, until none is left.

    A ``study`` in a user's file has to be named, as for :func:`normfree.runner.load_study`.

    Returns:
        As :func:`train_study`; a run that failed here may still be finished elsewhere.

    Raises:
        InputError: nobody is training a study there, or its tokens cannot be found.
    """
    work = open_work(path, study)
    with shown_on(console):
        return _drive(work, f"helping with {work.folder.study_name}").failures


def failure_summary(failures: Mapping[str, str]) -> str:
    """Which runs of a study failed, and why, in one line."""
    n = len(failures)
    return f"{n} run{'s' if n > 1 else ''} failed: " + "; ".join(f"{run} ({why})" for run, why in failures.items())


def _drive(work: Work, description: str, *, executor: Executor | None = None, retries: int = 0) -> RunQueue:
    """Trains until every run is finished or has failed permanently; without an executor in this process.

    This process does not retry: the run would fail in the same way.
    """
    n_tokens = sum(planned.n_tokens for planned in work.runs)
    with StudyProgress(n_tokens, description) as progress:
        if executor is None:
            return Driver(work, ThisProcess(work, progress), progress, retries=0).run()
        return Driver(work, executor, progress, retries).run()


def _measure(work: Work, planned: PlannedRun, console: Console) -> None:
    if work.measurement is not None:
        while work.holder(planned) is not None:
            time.sleep(LOOK_AGAIN_SECONDS)
        work.measure(planned, console)


@dataclass(frozen=True)
class _Attempt:
    """A run at work in a job."""

    planned: PlannedRun
    name: str
    job: Job


class Driver:
    """Starts runs that can begin on an executor, and collects their outcomes."""

    def __init__(self, work: Work, executor: Executor, progress: StudyProgress, retries: int) -> None:
        self._work = work
        self._executor = executor
        self._progress = progress
        self._queue = RunQueue(work.runs, retries=retries)
        self._attempts: list[_Attempt] = []
        self._not_before: dict[str, float] = {}
        self._held: set[str] = set()

    def run(self) -> RunQueue:
        """Runs until every run is finished or has failed permanently; an exception stops the executor."""
        try:
            while True:
                has_started = self._start()
                self._collect()
                self._show_progress()
                if self._queue.is_over:
                    return self._queue
                if not has_started:
                    time.sleep(self._executor.poll_seconds)
        except BaseException:
            at_work = [each.job for each in self._attempts if not each.job.is_done()]
            self._executor.stop(at_work, display().console)
            raise

    def _start(self) -> bool:
        """Starts the runs that can begin; returns True if there were any."""
        room = None if self._executor.at_once is None else self._executor.at_once - len(self._attempts)
        chosen: list[PlannedRun] = []
        for planned in self._queue.ready():
            if room is not None and len(chosen) >= room:
                break
            if self._can_begin(planned):
                chosen.append(planned)
        if not chosen:
            return False
        folder = self._work.folder
        tasks = [Task(folder.path.resolve(), each.place, uuid.uuid4().hex[:8], folder.reference) for each in chosen]
        for planned, task, job in zip(chosen, tasks, self._executor.start(tasks), strict=True):
            self._queue.begin(planned.place)
            self._attempts.append(_Attempt(planned, task.attempt, job))
            if job.where:
                self._say(f"{planned.label}: {job.where}")
        return True

    def _can_begin(self, planned: PlannedRun) -> bool:
        place = planned.place
        if time.monotonic() < self._not_before.get(place, 0.0):
            return False
        if is_finished(planned, self._work.folder):
            self._progress.skip(planned.n_tokens)
            self._queue.finish(place)
            return False
        holder = self._work.holder(planned)
        if holder is None:
            return True
        if place not in self._held:
            self._held.add(place)
            self._say(f"{planned.label} is left to another process: {holder}")
        self._not_before[place] = time.monotonic() + LOOK_AGAIN_SECONDS
        return False

    def _collect(self) -> None:
        done = [each for each in self._attempts if each.job.is_done()]
        self._attempts = [each for each in self._attempts if each not in done]
        for attempt in done:
            self._conclude(attempt)

    def _conclude(self, attempt: _Attempt) -> None:
        planned, report = attempt.planned, attempt.job.report
        if report is None:
            claims = self._work.claims(planned)
            with suppress(OSError):
                # A network file system may show an older state of a folder until this machine changes it.
                claims.chmod(claims.stat().st_mode)
            report = read_report(claims, attempt.name)
        if report is not None and report.state in ("failed", "refused", "stopped"):
            where = f" (on {report.host})" if report.host else ""
            self._failed(planned, f"{report.message}{where}", report.state)
        elif report is not None and report.state == "busy":
            self._not_before[planned.place] = time.monotonic() + LOOK_AGAIN_SECONDS
            self._queue.put_back(planned.place)
        elif (report is not None and report.state == "finished") or is_finished(planned, self._work.folder):
            self._queue.finish(planned.place)
            self._say_finished(planned, report)
        else:
            if report is not None:
                self._work.forget(planned, report)
            self._failed(planned, f"{attempt.job.where} {attempt.job.end()}")

    def _failed(self, planned: PlannedRun, reason: str, state: State = "failed") -> None:
        step = max(map(step_of, checkpoints(self._work.folder.path / planned.place)), default=0)
        is_over, was_stopped = state == "refused", state == "stopped"
        if self._queue.fail(planned.place, reason, step=step, for_good=is_over, was_stopped=was_stopped):
            self._say(f"{planned.label}: {reason}; tried again from step {step}")
        else:
            self._say(f"{planned.label} failed: {reason}")

    def _say_finished(self, planned: PlannedRun, report: Report | None) -> None:
        """Says that a run is finished; those that this process trained have printed their losses already."""
        if report is not None and not report.host:
            return
        where = "" if report is None else f" on {report.host}"
        run = to_train(planned, self._work.folder)
        loss = None if run is None else load_result(self._work.folder.path / planned.place).row[EVAL_LOSS]
        ending = "" if loss is None else f", evaluation loss {loss:.4f}"
        n_done, n = len(self._queue.finished), len(self._queue.runs)
        self._say(f"{planned.label}: finished{where}{ending} ({n_done} of {n})")

    def _show_progress(self) -> None:
        """Shows tokens done and in total, and the number of runs at work."""
        queue = self._queue
        total = sum(each.n_tokens for place, each in queue.runs.items() if place not in queue.failures)
        done = float(sum(queue.runs[place].n_tokens for place in queue.finished))
        for attempt in self._attempts:
            run = attempt.planned.run
            share = last_step(self._work.claims(attempt.planned)) / run.recipe.n_steps(run.data.sequence_length)
            done += share * attempt.planned.n_tokens
        at_work = f", {len(self._attempts)} at work" if self._attempts else ""
        self._progress.show(done, total, f"{len(queue.finished)} of {len(queue.runs)} runs{at_work}")

    def _say(self, line: str) -> None:
        display().say(line)
