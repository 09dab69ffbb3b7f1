"""One process at a time in an output folder: an operating-system lock, which dies with its process.

A second file names the owner. Readers need no lock: every file in a run folder is written atomically.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from normfree.errors import InputError
from normfree.files import is_unfinished, remove_unfinished, write_text

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
OWNER_FILE = ".lock.json"
"""Names the owner of the lock; removed with the lock, left behind by a killed process."""
START_TOLERANCE = 2.0
"""Tolerance between two readings of one process's start time, in seconds."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds ``folder`` for this process alone; creates it if necessary.

    Takes over the lock of a dead process, if it ran on this machine or in this SLURM job before a requeue. Removes
    leftovers of killed processes, and on exit a folder into which nothing was written.

    Raises:
        InputError: another process holds the folder, or a process on another machine may hold it.
    """
    made = _make(folder)
    lock = FileLock(folder / LOCK_FILE)
    owner_path = folder / OWNER_FILE
    try:
        while not lock.is_locked:
            try:
                lock.acquire(blocking=False)
            except (FileNotFoundError, FileExistsError):
                # Another process created the folder, wrote nothing into it, and has just removed it: before filelock
                # opened its file, or between the two checks of its mkdir.
                made = _make(folder)
            except Timeout:
                owner = _named(_owner(owner_path))
                raise InputError(f"{folder} is in use by {owner}; wait for it, or stop it") from None
        _check_former(folder, _owner(owner_path))
        remove_unfinished(folder)
        write_text(owner_path, json.dumps(_this_process()))
        try:
            yield
        finally:
            owner_path.unlink(missing_ok=True)
    finally:
        if lock.is_locked and {each.name for each in folder.iterdir()} <= {LOCK_FILE}:
            (folder / LOCK_FILE).unlink(missing_ok=True)
        lock.release()
        for each in made:
            with suppress(OSError):  # not empty
                each.rmdir()


def sweep(folder: Path) -> None:
    """Removes leftovers of a killed process from a folder whose work is done, which nobody will lock again."""
    if (folder / OWNER_FILE).exists():
        # A folder that is locked after all, or that this process may not write into, stays as it is.
        with suppress(InputError, OSError, RuntimeError), locked(folder):
            pass


def remove_abandoned(folder: Path) -> None:
    """Removes a folder whose owner (see :func:`locked`) is dead; leaves a folder in use alone."""
    # filelock raises RuntimeError if this process already holds the lock.
    with suppress(InputError, RuntimeError):
        with locked(folder):
            for each in folder.iterdir():
                if each.is_dir():
                    shutil.rmtree(each)
        folder.rmdir()


def holds_nothing(folder: Path) -> bool:
    """True if ``folder`` is missing, or holds nothing but a lock and leftovers of killed processes."""
    if not folder.exists():
        return True
    return all(each.name in (LOCK_FILE, OWNER_FILE) or is_unfinished(each) for each in folder.iterdir())


def _make(folder: Path) -> list[Path]:
    """Creates ``folder``; returns the folders that were missing, innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return missing
        except FileExistsError:
            # Another process removed an empty folder between mkdir's two checks.
            if folder.exists() and not folder.is_dir():
                raise


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": psutil.Process().create_time(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _owner(path: Path) -> dict[str, Any]:
    """What :func:`_this_process` wrote; empty if the file is missing or incomplete."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


def _check_former(folder: Path, former: dict[str, Any]) -> None:
    """Checks that the previous owner named in ``folder`` is dead, once the operating system granted the lock.

    The lock alone suffices on one machine with a file system that has locks; few network file systems guarantee it
    across machines.

    Raises:
        InputError: the owner is alive, or ran on another machine.
    """
    if not former:
        return
    here = _this_process()
    if former.get("slurm_job") is not None and former.get("slurm_job") == here["slurm_job"]:
        log.warning("resuming in %s after %s of the same SLURM job", folder, _named(former))
    elif former.get("host") != here["host"]:
        raise InputError(
            f"{folder} was in use by {_named(former)}, and whether that process is alive cannot be seen from "
            f"{here['host']}; if it is not, delete {folder / OWNER_FILE} and give the same command again"
        )
    elif _is_alive(former):
        raise InputError(f"{folder} is in use by {_named(former)}; wait for it, or stop it")
    else:
        log.warning("resuming in %s after %s, which is dead", folder, _named(former))


def _is_alive(owner: dict[str, Any]) -> bool:
    """True if the process is alive and its PID was not reused."""
    try:
        start = psutil.Process(int(owner["pid"])).create_time()
        return abs(start - float(owner["process_start"])) < START_TOLERANCE
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False
