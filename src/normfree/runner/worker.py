"""A worker: takes runs of a study that others work on too, trains and measures them, and says how far it is.

What workers and their study tell each other are small files in the study's folder ``workers``, which is taken away
when all runs are finished:

``plan.json``: which seeds and configurations, whether learning rates are tuned, and where the tokens are.
``RUN/.lock``: who trains and measures the run now (see :mod:`normfree.locks`).
``RUN/ATTEMPT.json``: what one worker says of its attempt at it (:class:`Report`).
``RUN/ATTEMPT.log``: what it printed, where nobody else keeps that.
"""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from normfree.data import PackedData
from normfree.errors import InputError, RunFailedError
from normfree.files import write_text
from normfree.locks import OWNER_FILE, locked
from normfree.runner.plan import PlannedRun, plan_study, to_train
from normfree.runner.study import Measurement, Study, StudyFolder
from normfree.signals import Interrupted, stopping_cleanly
from normfree.training import load_result, train

WORKERS_FOLDER = "workers"
PLAN_FILE = "plan.json"
REPORT_SECONDS = 2.0
"""Between two reports of a worker that trains."""

State = Literal["training", "finished", "failed", "refused", "busy", "stopped"]


@dataclass(frozen=True)
class Report:
    """What a worker says of its attempt at a run.

    ``refused`` is bad input: another attempt would be refused too. ``busy``: another process has the run. ``stopped``:
    the worker was told to stop, and saved a checkpoint.
    """

    state: State
    host: str
    pid: int
    step: int = 0
    eval_loss: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Work:
    """A study that is ready to be trained."""

    folder: StudyFolder
    plan: tuple[PlannedRun, ...]
    data: PackedData
    measurement: Measurement | None

    def claims(self, planned: PlannedRun) -> Path:
        """The folder whose lock whoever trains or measures the run holds."""
        return self.folder.path / WORKERS_FOLDER / planned.place

    def train(self, planned: PlannedRun, *callbacks: TrainerCallback) -> None:
        """Trains a run whose turn has come, or goes on with it.

        Raises:
            InputError: it cannot be used, or another process has it (:meth:`holder` tells which).
            RunFailedError: it could not go on.
        """
        run = to_train(planned, self.folder)
        if run is not None:
            with locked(self.claims(planned)):
                train(run, self.data, self.folder.path / planned.place, callbacks=callbacks)

    def measure(self, planned: PlannedRun, console: Console) -> None:
        """Measures a finished run, as far as it has not been measured yet.

        Raises:
            InputError: another process has the run.
        """
        if self.measurement is not None and planned.group == "runs":
            with locked(self.claims(planned)):
                self.measurement.measure(load_result(self.folder.path / planned.place), self.data, console)

    def holder(self, planned: PlannedRun) -> str | None:
        """Who has the run, in words; None if it is free, or its last holder is known to be dead."""
        for folder in (self.claims(planned), self.folder.path / planned.place):
            if (folder / OWNER_FILE).exists():
                try:
                    with locked(folder):
                        pass
                except InputError as error:
                    return str(error)
        return None


def write_plan(
    folder: StudyFolder, seeds: list[int], *, tune_lr: bool, only: Collection[str] | None, cache_dir: Path
) -> None:
    """Says to the workers what there is to do."""
    labels = None if only is None else list(only)
    content = {"seeds": seeds, "tune_lr": tune_lr, "only": labels, "cache_dir": str(cache_dir.resolve())}
    write_text(folder.path / WORKERS_FOLDER / PLAN_FILE, json.dumps(content) + "\n")


def open_work(path: Path, reference: str | Path | None = None) -> Work:
    """The study in ``path``, which ``normfree study`` has begun and not finished.

    ``reference`` is for a study in a user's file (see :func:`normfree.runner.opening.open_folder`).

    Raises:
        InputError: there is no such study, or its tokens cannot be had.
    """
    from normfree.runner.opening import open_folder

    plan_path = path / WORKERS_FOLDER / PLAN_FILE
    opened = open_folder(path, reference)
    study = getattr(opened, "study", None)
    if not isinstance(study, Study):
        raise InputError(f"{path} holds several studies; give the folder of one of them")
    if not plan_path.exists():
        raise InputError(f"nobody is training the study in {path} ({plan_path} is missing); begin with normfree study")
    folder = StudyFolder.open(path)
    try:
        content = json.loads(plan_path.read_text(encoding="utf-8"))
        seeds, tune_lr = [int(seed) for seed in content["seeds"]], bool(content["tune_lr"])
        only = None if content["only"] is None else [str(label) for label in content["only"]]
        cache_dir = Path(content["cache_dir"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{plan_path} is damaged; give the study's command again, it writes the file anew") from error
    measurement = study.measurement(folder.preset) if study.measurement is not None else None
    plan = plan_study(study, folder.preset, seeds, tune_lr=tune_lr, only=only)
    return Work(folder, plan, folder.prepare_data(cache_dir, progress=False), measurement)


def work_on(path: str, place: str, attempt: str, reference: str) -> None:
    """One attempt at one run of the study in ``path``, in a process that some engine has started for it.

    The driver gives the ``reference`` by which it found the study (see :func:`~normfree.runner.catalog.find_study`).

    Never raises an Exception: what became of the attempt stands in its report. SIGTERM makes the run save itself.
    """
    folder = Path(path)
    reporting = Reporting(folder / WORKERS_FOLDER / place / f"{attempt}.json")
    try:
        with stopping_cleanly():
            work = open_work(folder, reference)
            planned = next(each for each in work.plan if each.place == place)
            try:
                work.train(planned, reporting)
                work.measure(planned, Console(stderr=True))
            except InputError as error:
                reporting.end("busy" if work.holder(planned) is not None else "refused", str(error))
                return
        reporting.end("finished")
    except InputError as error:
        reporting.end("refused", str(error))
    except (RunFailedError, OSError) as error:
        reporting.end("failed", str(error))
    except Interrupted as stop:
        reporting.end("stopped", str(stop))
    except Exception as error:
        traceback.print_exc()  # into the worker's log: nobody foresaw it
        reporting.end("failed", f"{type(error).__name__}: {error}")


class Reporting(TrainerCallback):
    """Keeps the report of one attempt, in a file, while the Trainer trains."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._report = Report("training", socket.gethostname(), os.getpid())
        self._written_at = float("-inf")

    def end(self, state: State, message: str = "") -> None:
        """Writes the last report."""
        self._write(state=state, message=" ".join(message.split()))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._write(step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if time.monotonic() - self._written_at >= REPORT_SECONDS:
            self._write(step=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if "eval_loss" in (logs or {}):
            self._write(step=state.global_step, eval_loss=float((logs or {})["eval_loss"]))

    def _write(self, **changes: Any) -> None:
        self._report = Report(**{**asdict(self._report), **changes})
        self._written_at = time.monotonic()
        with suppress(OSError):  # no reason to end a run: the study sees from the run's folder how it ended
            write_text(self._path, json.dumps(asdict(self._report)) + "\n")


def read_report(claims: Path, attempt: str) -> Report | None:
    """What the worker said last; None if it has said nothing yet."""
    try:
        return Report(**json.loads((claims / f"{attempt}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def last_step(claims: Path) -> int:
    """The furthest step that any worker has reported of the run."""
    reports = [read_report(claims, path.stem) for path in claims.glob("*.json") if not path.name.startswith(".")]
    return max((report.step for report in reports if report is not None), default=0)


def forget(work: Work, planned: PlannedRun, report: Report) -> None:
    """Takes away the name that a dead worker left in the locks of its run.

    Another machine could not know that it is dead, and would refuse the run. Where the file system has locks, they
    still keep out a worker that lives on unseen.
    """
    for folder in (work.claims(planned), work.folder.path / planned.place):
        with suppress(OSError, ValueError):
            owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
            if (owner.get("host"), owner.get("pid")) == (report.host, report.pid):
                (folder / OWNER_FILE).unlink()
