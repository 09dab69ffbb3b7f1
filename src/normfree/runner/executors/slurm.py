"""A SLURM job array, through submitit: one task for each run."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.console import Console

from normfree.errors import InputError, RunFailedError
from normfree.runner.executors.executor import Executor, Job, Settings, Task, not_installed
from normfree.runner.work import WORKERS_FOLDER
from normfree.runner.worker import work_on

if TYPE_CHECKING:
    import submitit


class SlurmSettings(Settings):
    """What each run asks of SLURM; see sbatch's manual.

    minutes: the time limit of a job. A run that needs more resumes in another job.
    gpus: 1, or 0 for none. A run is one process on one GPU.
    cpus: cores of a run.
    signal_seconds: how long before the time limit a run gets the signal to save itself.
    setup: a shell command before the worker, such as ``module load cuda``.
    sbatch: any other option of sbatch, as ``--executor-set sbatch.NAME=VALUE``.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    minutes: int = Field(1440, ge=1)
    gpus: int = Field(1, ge=0, le=1)
    cpus: int = Field(4, ge=1)
    memory_gb: float | None = Field(None, gt=0)
    signal_seconds: int = Field(120, ge=1)
    setup: str | None = None
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)


class SlurmJob(Job):
    """A task of a job array."""

    def __init__(self, job: submitit.Job[None]) -> None:
        self._job = job

    @property
    def where(self) -> str:
        return f"SLURM job {self._job.job_id}"

    def is_done(self) -> bool:
        return self._job.done()

    def end(self) -> str:
        return f"ended with state {self._job.state}; its log: {self._job.paths.stderr}"


class SlurmExecutor(Executor):
    """Submits the runs that can begin as one array, and those that become ready later, or failed, as further ones.

    submitit pickles what it submits: a function of this module and four strings, in files of this study that only the
    submitted job reads. What the jobs return is never read.
    """

    name = "slurm"
    settings_type = SlurmSettings
    poll_seconds = 5.0
    at_once = None

    def __init__(self, settings: SlurmSettings, workers: int | None) -> None:
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            raise not_installed(self.name, "submitit") from error
        super().__init__(settings, workers)

    def __enter__(self) -> SlurmExecutor:
        engine(Path())
        return self

    def __exit__(self, *_: object) -> None:
        """The jobs do not depend on this process."""

    def start(self, tasks: Sequence[Task]) -> list[Job]:
        import submitit

        submitting = engine(tasks[0].folder / WORKERS_FOLDER / "slurm" / "%j")
        submitting.update_parameters(**self._parameters(len(tasks)))
        try:
            with submitting.batch():
                jobs = [submitting.submit(work_in_job, *task.arguments) for task in tasks]
        except submitit.core.utils.FailedJobError as error:  # what its CommandFunction makes of sbatch's refusal
            raise RunFailedError(f"sbatch refused the jobs: {str(error).strip()}") from error
        return [SlurmJob(job) for job in jobs]

    def stop(self, jobs: Sequence[Job], console: Console) -> None:
        if jobs:
            arrays = sorted({job.where.removeprefix("SLURM job ").partition("_")[0] for job in jobs})
            console.print(
                f"{len(jobs)} runs continue in SLURM jobs {', '.join(arrays)}: the same command follows them again, "
                f"`scancel {' '.join(arrays)}` ends them",
                highlight=False,
                soft_wrap=True,
            )

    def _parameters(self, n_tasks: int) -> dict[str, Any]:
        chosen = self.settings
        given = {
            "slurm_partition": chosen.partition,
            "slurm_account": chosen.account,
            "slurm_qos": chosen.qos,
            "slurm_constraint": chosen.constraint,
            "slurm_setup": None if chosen.setup is None else [chosen.setup],
            "slurm_additional_parameters": dict(chosen.sbatch) or None,
            "mem_gb": chosen.memory_gb,
            "gpus_per_node": chosen.gpus or None,
        }
        return {
            "name": "normfree",
            "timeout_min": chosen.minutes,
            "cpus_per_task": chosen.cpus,
            "slurm_signal_delay_s": chosen.signal_seconds,
            "slurm_array_parallelism": self.workers or n_tasks,
            **{name: value for name, value in given.items() if value is not None},
        }


def engine(folder: Path) -> submitit.AutoExecutor:
    """submitit's own executor, with its files in ``folder``.

    Raises:
        InputError: this machine cannot submit to SLURM.
    """
    import submitit

    try:
        return submitit.AutoExecutor(folder, cluster="slurm")
    except RuntimeError as error:
        raise InputError("--executor slurm: srun is not on PATH; give the command where jobs are submitted") from error


def work_in_job(folder: str, place: str, attempt: str, study: str) -> None:
    """What a job runs. submitit has SLURM send SIGUSR2 before the time limit; to a worker that is a SIGTERM."""
    signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))
    work_on(folder, place, attempt, study)
