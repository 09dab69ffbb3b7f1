"""Processes that train one run: forks of this one, numbered as by torchrun."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState

from tests.forked import forked

LONGEST = 300.0
"""Seconds after which processes that do not end count as hanging, on a busy machine too."""


@dataclass(frozen=True)
class Ended:
    """How each process ended: exit codes (minus the signal for one that was killed) and outputs, by rank."""

    codes: list[int]
    outputs: list[str]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)


def together(n: int, job: Callable[[], object], folder: Path) -> Ended:
    """Runs ``job`` in ``n`` processes that know of each other; their output goes to files in ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"output-{rank}" for rank in range(n)]
    processes = {forked(_numbered(job, _numbers(rank, n, port)), outputs[rank]): rank for rank in range(n)}
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LONGEST
    while len(codes) < n:
        for pid, rank in processes.items():
            if rank not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid, rank in processes.items():
                if rank not in codes:
                    os.kill(pid, 9)
                    os.waitpid(pid, 0)
            raise AssertionError(f"of {n} processes, {n - len(codes)} hang: {[each.read_text() for each in outputs]}")
        time.sleep(0.02)
    return Ended([codes[rank] for rank in range(n)], [each.read_text(errors="replace") for each in outputs])


def _numbers(rank: int, n: int, port: int) -> dict[str, str]:
    """What a launcher tells the processes; nothing to a single one, which has none."""
    if n == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _numbered(job: Callable[[], object], numbers: dict[str, str]) -> Callable[[], None]:
    def numbered() -> None:
        os.environ.update(numbers)
        # Another test may have trained in this process, alone.
        AcceleratorState._reset_state(True)
        job()

    return numbered
