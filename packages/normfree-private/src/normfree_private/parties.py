"""The parties of a protocol as local processes: all of them finish, or all are ended."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from normfree.errors import RunFailedError

_POLL_SECONDS = 0.02
_GRACE_SECONDS = 5.0


class EngineError(RunFailedError):
    """The engine failed during a measurement; the message is one line."""


def free_ports(n: int) -> list[int]:
    """``n`` different free ports of the loopback interface."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def run_parties(commands: Sequence[Sequence[str]], folder: Path, *, timeout_seconds: float) -> list[str]:
    """Runs one process for each command, concurrently, and returns their standard outputs.

    Their standard input is a pipe that closes when this process ends: parties that watch it do not outlive it.
    Standard output and error of party i go to ``party-i.out`` and ``party-i.err`` in ``folder``.

    Raises:
        EngineError: a party failed or was killed, or they did not finish in time; the others were ended.
    """
    outputs = [folder / f"party-{rank}.out" for rank in range(len(commands))]
    with ExitStack() as stack:
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, processes)
        for rank, command in enumerate(commands):
            out = stack.enter_context(outputs[rank].open("wb"))
            err = stack.enter_context((folder / f"party-{rank}.err").open("wb"))
            processes.append(subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=out, stderr=err))
        deadline = time.monotonic() + timeout_seconds
        while any(process.poll() is None for process in processes):
            _check(processes, folder)
            if time.monotonic() > deadline:
                raise EngineError(
                    f"the {len(processes)} parties did not finish within {timeout_seconds:g} s and were ended; "
                    "give more time with --timeout, or a smaller model"
                )
            time.sleep(_POLL_SECONDS)
        _check(processes, folder)
    return [path.read_text(encoding="utf-8", errors="replace") for path in outputs]


def _check(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    failed = [(rank, process) for rank, process in enumerate(processes) if process.poll()]
    if not failed:
        return
    rank, process = failed[0]
    lines = (folder / f"party-{rank}.err").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = f": {lines[-1].strip()}" if lines else ""
    raise EngineError(f"party {rank} of {len(processes)} {_how(process.returncode)}, the others were ended{reason}")


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the processes that still run, and waits for all of them."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
