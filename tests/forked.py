"""Forks of this process, which need not import everything again, with their output in a file."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

from normfree import cli


def forked(job: Callable[[], object], output: Path) -> int:
    """Starts ``job`` in a fork whose standard streams go to ``output``; returns its number.

    Its exit code is that of the job's SystemExit, 0 where there is none, and 99 after any other error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(out, stream)
        # pytest has put others in their place.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
        job()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class ForkedWorker:
    """In the place of ``subprocess.Popen`` in an executor: ``python -c PROGRAM ARGUMENTS`` in a fork."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: IO[bytes], **_: object) -> None:
        program, *arguments = command[2:]

        def job() -> None:
            os.environ.update(env)
            sys.argv = ["-c", *arguments]
            exec(program)

        self.pid = forked(job, Path(stdout.name))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._waited(os.WNOHANG)

    def wait(self) -> int | None:
        return self._waited(0)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def normfree(*arguments: object) -> Callable[[], None]:
    """The command line as a job."""

    def job() -> None:
        sys.argv = ["normfree", *map(str, arguments)]
        cli.main()

    return job
