"""What every executor does: it starts tasks somewhere, and knows whether they are still there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from normfree.errors import InputError
from normfree.runner.work import Report


class Settings(BaseModel):
    """The options of one executor, as ``--executor-set`` gives them."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Task:
    """One attempt at one run: the arguments of :func:`normfree.runner.worker.work_on`, which every engine calls."""

    folder: Path
    place: str
    attempt: str
    study: str

    @property
    def arguments(self) -> tuple[str, str, str, str]:
        return str(self.folder), self.place, self.attempt, self.study


class Job(ABC):
    """A task that an engine has taken."""

    report: Report | None = None
    """What became of it, if this process knows; a worker reports in a file."""

    @property
    @abstractmethod
    def where(self) -> str:
        """The name by which the engine's own tools know it."""

    @abstractmethod
    def is_done(self) -> bool:
        """True if its process has ended or will never begin."""

    @abstractmethod
    def end(self) -> str:
        """How a job that is done ended, as far as the engine knows; for those whose worker could not report it."""


class Executor(ABC):
    """An engine that trains the runs of a study; a context manager, inside which it takes tasks.

    ``at_once`` is how many tasks it is given at a time; None leaves the queue to the engine.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings
    poll_seconds: ClassVar[float] = 1.0

    at_once: int | None

    def __init__(self, settings: Any, workers: int | None) -> None:
        """Takes settings of :attr:`settings_type`, and how many runs may be at work at once, if that is given.

        Raises:
            InputError: what the engine needs is not installed.
        """
        self.settings = settings
        self.workers = workers

    def __enter__(self) -> Self:
        """Finds the engine.

        Raises:
            InputError: this machine cannot reach it, or is too small.
        """
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Leaves the engine, which has no jobs of the study any more."""

    @abstractmethod
    def start(self, tasks: Sequence[Task]) -> list[Job]:
        """Gives tasks to the engine, at least one."""

    @abstractmethod
    def stop(self, jobs: Sequence[Job], console: Console) -> None:
        """Ends the jobs of a study that is stopped, or prints that they continue."""


def not_installed(executor: str, package: str) -> InputError:
    """The library behind an executor is missing."""
    return InputError(
        f"--executor {executor} needs {package}, which is not installed: pip install 'normfree[{executor}]'"
    )
