"""Where the runs of a study are trained: in this process, or by workers that an executor starts.

A new engine is one file with one class, and one line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from normfree.errors import InputError, invalid_fields, unknown_name
from normfree.runner.executors.executor import Executor, Job, Settings, Task
from normfree.runner.executors.local import LocalExecutor
from normfree.runner.executors.ray import RayExecutor
from normfree.runner.executors.slurm import SlurmExecutor

EXECUTORS: dict[str, type[Executor]] = {
    "local": LocalExecutor,
    "slurm": SlurmExecutor,
    "ray": RayExecutor,
}

__all__ = ["EXECUTORS", "Executor", "Job", "Settings", "Task", "make_executor"]


def make_executor(name: str, settings: Mapping[str, Any], workers: int | None) -> Executor | None:
    """The executor ``name`` with these settings; None where the runs are to be trained in this process.

    Raises:
        InputError: the executor or one of its settings is unknown or wrong, or what it needs is not installed.
    """
    if name not in EXECUTORS:
        raise unknown_name("executor", name, EXECUTORS)
    if name == LocalExecutor.name and workers is None:
        if settings:
            raise InputError("--executor-set means nothing without --workers, --executor slurm or --executor ray")
        return None
    kind = EXECUTORS[name]
    try:
        chosen = kind.settings_type.model_validate(settings)
    except ValidationError as error:
        raise invalid_fields(f"--executor-set of {name}", error, kind.settings_type) from error
    return kind(chosen, workers)
