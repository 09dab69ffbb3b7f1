"""Worker processes on this machine, each with its own GPU where there are any."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from rich.console import Console

from normfree.devices import default_device
from normfree.errors import InputError
from normfree.runner.executors.executor import Executor, Job, Settings, Task
from normfree.runner.work import WORKERS_FOLDER

PROGRAM = """
import sys
from normfree.garbage import collect_less
collect_less()
from normfree.runner.worker import work_on
work_on(*sys.argv[1:])
"""


class LocalSettings(Settings):
    """gpus: share of a GPU for each worker, 0 for none; default one each where there are GPUs.
    cpus: CPU threads of a worker; default OMP_NUM_THREADS where it is set, or the cores divided by the workers.
    """

    gpus: float | None = Field(None, ge=0, le=1)
    cpus: int | None = Field(None, ge=1)


class LocalJob(Job):
    """A process of this machine, in one of the executor's slots."""

    def __init__(self, process: subprocess.Popen[bytes], slot: int) -> None:
        self.process = process
        self.slot = slot

    @property
    def where(self) -> str:
        return f"process {self.process.pid}"

    def is_done(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> str:
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class LocalExecutor(Executor):
    """A process for each run, in its own session: Ctrl-C reaches the driver alone, which passes it on."""

    name = "local"
    settings_type = LocalSettings
    poll_seconds = 0.5

    def __init__(self, settings: LocalSettings, workers: int | None) -> None:
        super().__init__(settings, workers)
        workers = workers or 1
        self.at_once = workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        default = os.environ.get("OMP_NUM_THREADS", max(1, cores // workers))
        self._threads = str(settings.cpus if settings.cpus is not None else default)
        self._jobs: list[LocalJob] = []

    def __enter__(self) -> LocalExecutor:
        self._devices = _devices(self.settings.gpus, self.workers or 1)
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._jobs:
            job.process.wait()

    def start(self, tasks: Sequence[Task]) -> list[Job]:
        return [self._start(task) for task in tasks]

    def stop(self, jobs: Sequence[Job], console: Console) -> None:
        alive = [job for job in self._jobs if not job.is_done()]
        console.print(f"{len(alive)} workers save their runs and stop (once more to stop them at once)")
        try:
            for job in alive:
                job.process.send_signal(signal.SIGTERM)
            for job in alive:
                job.process.wait()
        except BaseException:
            for job in alive:
                job.process.kill()
            raise

    def _start(self, task: Task) -> Job:
        self._jobs = [job for job in self._jobs if not job.is_done()]
        slot = min(set(range(len(self._devices))) - {job.slot for job in self._jobs})
        log = task.folder / WORKERS_FOLDER / task.place / f"{task.attempt}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": self._threads}
        if self._devices[slot] is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *task.arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        job = LocalJob(process, slot)
        self._jobs.append(job)
        return job


def _devices(gpus: float | None, workers: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each worker; None where there is nothing to choose."""
    there = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = there.split(",") if there else [str(number) for number in range(torch.cuda.device_count())]
    if gpus is None:
        gpus = 1.0 if names and default_device().type == "cuda" else 0.0
    if gpus == 0:
        return ["" if names else None] * workers
    shared = int(1 / gpus + 1e-9)
    if workers > len(names) * shared:
        raise InputError(
            f"{workers} workers with {gpus:g} of a GPU each need more than the {len(names)} GPUs of this machine; "
            "lower --workers or --executor-set gpus=..."
        )
    return [names[worker % len(names)] for worker in range(workers)]
