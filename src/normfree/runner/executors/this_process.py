"""Trains the runs of a study in this process, one at a time."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from normfree.errors import InputError, RunFailedError
from normfree.runner.executors.executor import Executor, Job, Settings, Task
from normfree.runner.work import Report, Work
from normfree.training import StudyProgress


class DoneJob(Job):
    """A task that ended while it was started."""

    where = ""

    def __init__(self, report: Report) -> None:
        self.report = report

    def is_done(self) -> bool:
        return True

    def end(self) -> str:
        return "ended"


class ThisProcess(Executor):
    """Trains a run while it is started. An InputError and a signal end the study, as they concern every run."""

    name = "local"
    at_once = 1

    def __init__(self, work: Work, progress: StudyProgress) -> None:
        super().__init__(Settings(), None)
        self._work = work
        self._progress = progress

    def __exit__(self, *_: object) -> None: ...

    def start(self, tasks: Sequence[Task]) -> list[Job]:
        return [DoneJob(self._train(task.place)) for task in tasks]

    def _train(self, place: str) -> Report:
        planned = next(each for each in self._work.runs if each.place == place)
        try:
            self._work.train(planned, self._progress.run(planned.label, planned.n_tokens))
        except RunFailedError as error:
            return Report("failed", message=str(error))
        except InputError:
            if self._work.holder(planned) is None:
                raise
            return Report("busy")
        return Report("finished")

    def stop(self, jobs: Sequence[Job], console: Console) -> None:
        """The run that was interrupted has saved itself."""
