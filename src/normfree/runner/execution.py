"""How a study is carried out, and the command that says so."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_jsonable_python
from rich.console import Console

from normfree.devices import check_device_name, on_device
from normfree.errors import InputError
from normfree.files import DEFAULT_CACHE_DIR
from normfree.runner.executors import Executor
from normfree.runner.executors.local import LocalExecutor

DEFAULT_RETRIES = 2
"""Tries of a run after its first failure without progress."""


@dataclass(frozen=True)
class Execution:
    """How a study is carried out.

    cache_dir: where tokenized corpora are kept.
    seeds: None for those of the preset.
    tune_lr: also train each configuration at multiples of the recipe's learning rate (see
        :func:`~normfree.runner.run_order.planned_runs`).
    only: labels of the configurations to train, with the baseline; None for all.
    executor: trains the runs; None: this process, one run at a time.
    retries: of a run that failed on an executor.
    device: of training, by its name; None: see :mod:`normfree.devices`.
    command: for the report, as :func:`study_command` writes it.
    """

    console: Console
    cache_dir: Path
    seeds: list[int] | None = None
    tune_lr: bool = False
    only: tuple[str, ...] | None = None
    executor: Executor | None = None
    retries: int = DEFAULT_RETRIES
    device: str | None = None
    command: str = ""

    def on_device(self) -> AbstractContextManager[None]:
        """Chooses the device in this process. Workers choose it themselves: another machine may have none such.

        Raises:
            InputError: there is no such device, or a number is given for workers.
        """
        if self.executor is None or self.device is None:
            return on_device(self.device)
        check_device_name(self.device)
        if ":" in self.device:
            raise InputError(f"each worker has a GPU of its own; give --device cuda in place of {self.device}")
        return on_device(self.device) if isinstance(self.executor, LocalExecutor) else nullcontext()


def study_command(name: str, preset: str, folder: Path, changes: Mapping[str, Any], execution: Execution) -> str:
    """The command that does what was asked, for a shell: all that is not left at its default.

    Args:
        name: of the study, as :func:`normfree.runner.find_study` takes it.
        preset: its name, or the path of a YAML file.
        folder: the study's.
        changes: of the preset, by dotted name.
        execution: what else was asked.
    """
    options = [("--preset", preset), ("--out", str(folder))]
    options += [("--set", f"{option}={_yaml(value)}") for option, value in changes.items()]
    options += _options(execution)
    tuned = ["--tune-lr"] if execution.tune_lr else []
    return shlex.join(["normfree", "study", name, *(word for option in options for word in option), *tuned])


def _options(execution: Execution) -> Iterator[tuple[str, str]]:
    """Options of ``normfree study`` with a value, by which it is carried out in this way."""
    if execution.seeds is not None:
        yield "--seeds", ",".join(map(str, execution.seeds))
    for label in execution.only or ():
        yield "--only", label
    if execution.device is not None:
        yield "--device", execution.device
    if execution.cache_dir != DEFAULT_CACHE_DIR:
        yield "--cache-dir", str(execution.cache_dir)
    executor = execution.executor
    if executor is None:
        return
    if executor.name != LocalExecutor.name:
        yield "--executor", executor.name
    if executor.workers is not None:
        yield "--workers", str(executor.workers)
    for option, value in executor.settings.model_dump(exclude_unset=True).items():
        named = (
            {f"{option}.{each}": one for each, one in value.items()} if isinstance(value, Mapping) else {option: value}
        )
        yield from (("--executor-set", f"{each}={_yaml(one)}") for each, one in named.items())
    if execution.retries != DEFAULT_RETRIES:
        yield "--retries", str(execution.retries)


def _yaml(value: Any) -> str:
    """A value as ``--set`` reads it: YAML in one line. JSON's 1e-05 would be text there."""
    plain = to_jsonable_python(value, fallback=str)
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.strip().removesuffix("\n...")
