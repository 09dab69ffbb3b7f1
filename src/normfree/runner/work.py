"""The work of a study: its runs, who has them, and the files that workers and their driver exchange.

These files are in the study's folder ``workers``, which is removed when all runs are finished:

``plan.json``: seeds and configurations, whether learning rates are tuned, where the tokens are, and the device.
``RUN/.lock``: who trains and measures the run now (see :mod:`normfree.locks`).
``RUN/ATTEMPT.json``: what one worker reports of its attempt at the run (:class:`Report`).
``RUN/ATTEMPT.log``: what it printed, unless the engine keeps that.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from normfree.data import PackedData
from normfree.devices import on_device
from normfree.errors import InputError
from normfree.files import write_text
from normfree.locks import OWNER_FILE, locked
from normfree.runner.catalog import studies_for, study_of
from normfree.runner.run_order import PlannedRun, planned_runs, to_train
from normfree.runner.study import Measurement, Study
from normfree.runner.study_folder import COLLECTION_FILE, StudyFolder
from normfree.training import Callback, load_result, train

WORKERS_FOLDER = "workers"
PLAN_FILE = "plan.json"

State = Literal["training", "finished", "failed", "refused", "busy", "stopped"]


@dataclass(frozen=True)
class Report:
    """The state of an attempt at a run.

    state: ``refused`` is bad input, which another attempt would not change; ``busy``: another process has the run;
        ``stopped``: a signal stopped the worker, which saved a checkpoint.
    host: the worker's machine; empty for the driver's own process.
    """

    state: State
    host: str = ""
    pid: int = 0
    step: int = 0
    eval_loss: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Work:
    """A study that is ready to be trained.

    device: of training and measuring, by its name; None: see :mod:`normfree.devices`.
    """

    folder: StudyFolder
    runs: tuple[PlannedRun, ...]
    data: PackedData
    measurement: Measurement | None
    device: str | None = None

    def claims(self, planned: PlannedRun) -> Path:
        """The folder whose lock is held by whoever trains or measures the run."""
        return self.folder.path / WORKERS_FOLDER / planned.place

    def train(self, planned: PlannedRun, *callbacks: Callback) -> None:
        """Trains a run whose turn has come, or resumes it.

        Raises:
            InputError: it cannot be used, another process has it (see :meth:`holder`), or the device is not here.
            RunFailedError: it could not continue.
        """
        run = to_train(planned, self.folder)
        if run is not None:
            with locked(self.claims(planned)), on_device(self.device):
                train(run, self.data, self.folder.path / planned.place, callbacks=callbacks)

    def measure(self, planned: PlannedRun, console: Console) -> None:
        """Measures a finished run, except for what is measured already.

        Raises:
            InputError: another process has the run, or the device is not here.
        """
        if self.measurement is not None and planned.group == "runs":
            with locked(self.claims(planned)), on_device(self.device):
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

    def forget(self, planned: PlannedRun, report: Report) -> None:
        """Removes the name that a dead worker left in the locks of its run.

        Another machine cannot know that the worker is dead, and would refuse the run. Where the file system has locks,
        they still keep out a worker that lives on unseen.
        """
        for folder in (self.claims(planned), self.folder.path / planned.place):
            with suppress(OSError, ValueError):
                owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
                if (owner.get("host"), owner.get("pid")) == (report.host, report.pid):
                    (folder / OWNER_FILE).unlink()


def write_plan(
    folder: StudyFolder,
    seeds: list[int],
    *,
    tune_lr: bool,
    only: Collection[str] | None,
    cache_dir: Path,
    device: str | None,
) -> None:
    """Writes for the workers what there is to do."""
    labels = None if only is None else list(only)
    place = str(cache_dir.resolve())
    content = {"seeds": seeds, "tune_lr": tune_lr, "only": labels, "cache_dir": place, "device": device}
    write_text(folder.path / WORKERS_FOLDER / PLAN_FILE, json.dumps(content) + "\n")


def open_work(path: Path, reference: str | Path | None = None) -> Work:
    """The study in ``path``, which ``normfree study`` has begun and not finished.

    ``reference`` names the study, if it is not installed (see :func:`normfree.runner.catalog.studies_for`).

    Raises:
        InputError: there is no such study, or its tokens cannot be found.
    """
    if (path / COLLECTION_FILE).exists():
        raise InputError(f"{path} holds several studies; give the folder of one of them")
    plan_path = path / WORKERS_FOLDER / PLAN_FILE
    folder = StudyFolder.open(path)
    study = study_of(folder, studies_for(path, folder.study_file, reference))
    if not plan_path.exists():
        raise InputError(f"nobody is training the study in {path} ({plan_path} is missing); begin with normfree study")
    try:
        content = json.loads(plan_path.read_text(encoding="utf-8"))
        seeds, tune_lr = [int(seed) for seed in content["seeds"]], bool(content["tune_lr"])
        only = None if content["only"] is None else [str(label) for label in content["only"]]
        cache_dir = Path(content["cache_dir"])
        device = None if content["device"] is None else str(content["device"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{plan_path} is damaged; give the study's command again, it writes the file anew") from error
    runs = planned_runs(study, folder.preset, seeds, tune_lr=tune_lr, only=only)
    return Work(folder, runs, folder.prepare_data(cache_dir), measurement_of(study, folder), device)


def measurement_of(study: Study, folder: StudyFolder) -> Measurement | None:
    """What the study measures of its runs in ``folder``, if it measures anything."""
    return None if study.measurement is None else study.measurement(folder.preset)


def read_report(claims: Path, attempt: str) -> Report | None:
    """What the worker reported last; None before its first report."""
    try:
        return Report(**json.loads((claims / f"{attempt}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def last_step(claims: Path) -> int:
    """The furthest step that any worker has reported of the run."""
    reports = [read_report(claims, path.stem) for path in claims.glob("*.json") if not path.name.startswith(".")]
    return max((report.step for report in reports if report is not None), default=0)
