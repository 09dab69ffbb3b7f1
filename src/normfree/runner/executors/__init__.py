"""Executors, the engines that train the runs of a study: this process, or workers on this machine, SLURM or Ray.

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
from normfree.runner.executors.this_process import ThisProcess

EXECUTORS: dict[str, type[Executor]] = {
    "local": LocalExecutor,
    "slurm": SlurmExecutor,
    "ray": RayExecutor,
}
"""Places where the runs of a study are trained, by the name that ``--executor`` gives."""

__all__ = ["EXECUTORS", "Executor", "Job", "Settings", "Task", "ThisProcess", "make_executor"]


def make_executor(name: str, settings: Mapping[str, Any], workers: int | None) -> Executor | None:
    """The executor ``name`` with these settings; None where this process is to train the runs.

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
