"""Kills the command line at chosen moments, in forked processes that need not import everything again."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.forked import forked

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.utime")
"""Audit events of calls that change a file system; opening a file to write to it is one too."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Kill:
    """Where SIGKILL hits: before the n-th change to the files below a folder, before the first change whose event and
    paths have these words in them, or some seconds after the start."""

    change: int | None = None
    before: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, -9 for one that was killed; its output; the changes to files it got to."""

    code: int
    output: str
    changes: int


def in_child(job: Callable[[], object], folder: Path, kill: Kill | None = None) -> Ended:
    """Runs ``job`` in a fork of this process whose standard streams go to a file in ``folder``'s parent."""
    output, counted = folder.parent / f"{folder.name}.output", folder.parent / f"{folder.name}.changes"

    def counted_job() -> None:
        _count_changes(folder, counted, kill or Kill())
        job()

    pid = forked(counted_job, output)
    if kill is not None and kill.seconds is not None:
        time.sleep(kill.seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    changes = counted.stat().st_size if counted.exists() else 0
    return Ended(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"), changes)


def random_kills(choose: random.Random, whole: Ended, seconds: float, n: int) -> list[Kill]:
    """Every other one by the clock; ``whole`` is the job never killed, which took ``seconds``."""
    return [
        Kill(seconds=choose.uniform(0, seconds)) if number % 2 else Kill(change=choose.randint(1, whole.changes))
        for number in range(n)
    ]


def killed_again_and_again(job: Callable[[], object], folder: Path, kills: Iterable[Kill]) -> list[Ended]:
    """How ``job`` ended at each of ``kills``, and in the end, when it came to it or was left alone."""
    ends = []
    for kill in kills:
        ends.append(in_child(job, folder, kill))
        if ends[-1].code != -signal.SIGKILL:
            return ends
    return [*ends, in_child(job, folder)]


def _count_changes(folder: Path, counted: Path, kill: Kill) -> None:
    """Writes a byte to ``counted`` for every change below ``folder``; kills this process before one of them."""
    tally = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    prefix, seen = str(folder), 0

    def see(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if not (event in CHANGES or (event == "open" and _writes(arguments))):
            return
        if not str(arguments[0]).startswith(prefix):
            return
        seen += 1
        os.write(tally, b".")
        words = " ".join(map(str, (event, *arguments)))
        if seen == kill.change or (kill.before and all(each in words for each in kill.before)):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)


def _writes(arguments: tuple[object, ...]) -> bool:
    _, mode, flags = arguments
    return any(letter in mode for letter in "wxa+") if isinstance(mode, str) else bool(int(str(flags)) & WRITING)
