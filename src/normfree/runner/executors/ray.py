"""Tasks on a Ray cluster."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.console import Console

from normfree.errors import InputError
from normfree.runner.executors.executor import Executor, Job, Settings, Task, not_installed
from normfree.runner.worker import work_on

if TYPE_CHECKING:
    import ray

OBJECT_STORE_BYTES = 100_000_000
"""Of a cluster started here: runs and their study share files and no objects."""
REACHABLE_SECONDS = 10.0


class RaySettings(Settings):
    """address: the cluster's HOST:PORT; ``auto`` for the one of this machine; ``local`` to start one of this machine
    alone; default RAY_ADDRESS, or ``local`` without it.
    gpus: share of a GPU for each run; default one where the cluster has any.
    cpus: cores and CPU threads of a run.
    """

    address: str | None = None
    gpus: float | None = Field(None, ge=0, le=1)
    cpus: int = Field(1, ge=1)


class RayJob(Job):
    """A task of the cluster."""

    def __init__(self, reference: ray.ObjectRef[None]) -> None:
        self.reference = reference

    @property
    def where(self) -> str:
        return f"Ray task {self.reference.task_id().hex()}"

    def is_done(self) -> bool:
        import ray

        return bool(ray.wait([self.reference], timeout=0)[0])

    def end(self) -> str:
        import ray

        try:
            ray.get(self.reference)
        except ray.exceptions.RayError as error:
            return next(iter(str(error).strip().splitlines()), type(error).__name__)
        return "ended"


class RayExecutor(Executor):
    """A task for each run, tried once by Ray: the study decides what is tried again."""

    name = "ray"
    settings_type = RaySettings
    poll_seconds = 0.5

    def __init__(self, settings: RaySettings, workers: int | None) -> None:
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise not_installed(self.name, "Ray") from error
        super().__init__(settings, workers)
        self.at_once = workers

    def __enter__(self) -> RayExecutor:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        address = self.settings.address or os.environ.get("RAY_ADDRESS", "local")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            options |= {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM)
        try:
            _check_reachable(address)
            ray.init(address=address, **options)
        except (OSError, ValueError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"--executor ray: no cluster at {address} ({reason})") from error
        finally:
            if is_main:
                signal.signal(signal.SIGTERM, before)  # Ray's would end this process with nothing said
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()

    def start(self, tasks: Sequence[Task]) -> list[Job]:
        import ray

        gpus = self.settings.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        remote = ray.remote(work_on).options(
            num_cpus=self.settings.cpus, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD"
        )
        return [RayJob(remote.remote(*task.arguments)) for task in tasks]

    def stop(self, jobs: Sequence[Job], console: Console) -> None:
        import ray

        references = [job.reference for job in jobs if isinstance(job, RayJob)]
        if not references:
            return
        console.print(f"{len(references)} Ray tasks save their runs and stop (once more to stop them at once)")
        for reference in references:
            ray.cancel(reference)
        ray.wait(references, num_returns=len(references))


def _check_reachable(address: str) -> None:
    """Connects to HOST:PORT once, as Ray itself tries for minutes.

    Raises:
        OSError: nothing listens there.
        ValueError: the port is no number.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=REACHABLE_SECONDS).close()
