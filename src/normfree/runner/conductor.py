"""Follows the workers of an executor: gives it the runs that can begin, and finds out what became of them."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console

from normfree.runner.executors import Executor, Job, Task
from normfree.runner.plan import PlannedRun, is_finished, to_train
from normfree.runner.schedule import Schedule
from normfree.runner.worker import Report, State, Work, forget, last_step, read_report
from normfree.training import load_result
from normfree.training.progress import study_bars
from normfree.training.run_folder import checkpoints, step_of

LOOK_AGAIN_SECONDS = 10.0
"""After which a run that another process has is looked at again."""


@dataclass(frozen=True)
class _Attempt:
    """A run at work in a job."""

    planned: PlannedRun
    name: str
    job: Job


class Conductor:
    """Gives an executor the runs that can begin, and finds out what became of them."""

    def __init__(self, work: Work, executor: Executor, console: Console, retries: int) -> None:
        self._work = work
        self._executor = executor
        self._console = console
        self._schedule = Schedule(work.plan, retries=retries)
        self._attempts: list[_Attempt] = []
        self._not_before: dict[str, float] = {}
        self._n_skipped_tokens = 0

    def conduct(self, description: str) -> Schedule:
        """Until every run is finished or has failed for good. Whatever ends it earlier stops the executor."""
        bars = study_bars(self._console)
        bar = bars.add_task(description, total=None, note="")
        with bars:
            try:
                while True:
                    self._collect()
                    self._start()
                    done, total, note = self._progress()
                    bars.update(bar, completed=done, total=total, note=note)
                    if self._schedule.is_over:
                        return self._schedule
                    time.sleep(self._executor.poll_seconds)
            except BaseException:
                bars.stop()
                self._executor.stop([each.job for each in self._attempts if not each.job.is_done()], self._console)
                raise

    def _start(self) -> None:
        room = None if self._executor.at_once is None else self._executor.at_once - len(self._attempts)
        chosen: list[PlannedRun] = []
        for planned in self._schedule.ready():
            if room is not None and len(chosen) >= room:
                break
            if self._can_begin(planned):
                chosen.append(planned)
        if not chosen:
            return
        names = [uuid.uuid4().hex[:8] for _ in chosen]
        folder = self._work.folder
        tasks = [
            Task(folder.path.resolve(), planned.place, name, folder.reference)
            for planned, name in zip(chosen, names, strict=True)
        ]
        jobs = self._executor.start(tasks)
        for planned, name, job in zip(chosen, names, jobs, strict=True):
            self._schedule.begin(planned.place)
            self._attempts.append(_Attempt(planned, name, job))
            say(self._console, f"{planned.label}: {job.where}")

    def _can_begin(self, planned: PlannedRun) -> bool:
        if time.monotonic() < self._not_before.get(planned.place, 0.0):
            return False
        if is_finished(planned, self._work.folder):
            self._n_skipped_tokens += planned.n_tokens
            self._schedule.finish(planned.place)
            return False
        holder = self._work.holder(planned)
        if holder is None:
            return True
        if planned.place not in self._not_before:
            say(self._console, f"{planned.label} is left to another process: {holder}")
        self._not_before[planned.place] = time.monotonic() + LOOK_AGAIN_SECONDS
        return False

    def _collect(self) -> None:
        done = [each for each in self._attempts if each.job.is_done()]
        self._attempts = [each for each in self._attempts if each not in done]
        for attempt in done:
            self._conclude(attempt)

    def _conclude(self, attempt: _Attempt) -> None:
        planned = attempt.planned
        claims = self._work.claims(planned)
        with suppress(OSError):
            # A network file system may show this machine an older state of a folder, until the folder is changed here.
            claims.chmod(claims.stat().st_mode)
        report = read_report(claims, attempt.name)
        if report is not None and report.state in ("failed", "refused", "stopped"):
            self._failed(planned, f"{report.message} (on {report.host})", report.state)
        elif report is not None and report.state == "busy":
            self._not_before[planned.place] = time.monotonic() + LOOK_AGAIN_SECONDS
            self._schedule.put_back(planned.place)
        elif (report is not None and report.state == "finished") or is_finished(planned, self._work.folder):
            self._schedule.finish(planned.place)
            self._say_finished(planned, report)
        else:
            if report is not None:
                forget(self._work, planned, report)
            self._failed(planned, f"{attempt.job.where} {attempt.job.end()}")

    def _failed(self, planned: PlannedRun, reason: str, state: State = "failed") -> None:
        step = max(map(step_of, checkpoints(self._work.folder.path / planned.place)), default=0)
        is_over, was_stopped = state == "refused", state == "stopped"
        if self._schedule.fail(planned.place, reason, step=step, for_good=is_over, was_stopped=was_stopped):
            say(self._console, f"{planned.label}: {reason}; tried again from step {step}")
        else:
            say(self._console, f"{planned.label} failed: {reason}")

    def _say_finished(self, planned: PlannedRun, report: Report | None) -> None:
        where = "" if report is None else f" on {report.host}"
        run = to_train(planned, self._work.folder)
        loss = None if run is None else load_result(self._work.folder.path / planned.place).row["eval_loss"]
        ending = "" if loss is None else f", evaluation loss {loss:.4f}"
        n_done, n = len(self._schedule.finished), len(self._schedule.plan)
        say(self._console, f"{planned.label}: finished{where}{ending} ({n_done} of {n})")

    def _progress(self) -> tuple[float, int, str]:
        """Tokens trained on and to be trained on, and what is going on."""
        schedule = self._schedule
        total = sum(each.n_tokens for place, each in schedule.plan.items() if place not in schedule.failures)
        done = float(sum(schedule.plan[place].n_tokens for place in schedule.finished))
        for attempt in self._attempts:
            run = attempt.planned.run
            share = last_step(self._work.claims(attempt.planned)) / run.recipe.n_steps(run.data.sequence_length)
            done += share * attempt.planned.n_tokens
        note = f"{len(schedule.finished)} of {len(schedule.plan)} runs, {len(self._attempts)} at work"
        return done - self._n_skipped_tokens, total - self._n_skipped_tokens, note


def say(console: Console, line: str) -> None:
    """Prints a line of any length as one."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
