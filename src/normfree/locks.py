"""One process at a time in an output folder: a lock of the operating system, which dies with its process.

A file beside it says whose it is. Reading needs no lock: every file in a run folder is written whole or not at all.
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
"""Who holds the lock; it is removed with the lock, and left behind by a process that was killed."""
START_TOLERANCE = 2.0
"""Seconds by which two readings of one process's start may differ."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds ``folder``, made if need be, for this process alone.

    A lock whose process is dead is taken over: of this machine, or of this SLURM job before it was requeued. A folder
    into which nothing was written is taken away again, and so is what a killed process left unfinished in one.

    Raises:
        InputError: another process has the folder, or it may be that one on another machine has it.
    """
    made = _make(folder)
    lock = FileLock(folder / LOCK_FILE)
    owner_path = folder / OWNER_FILE
    try:
        while not lock.is_locked:
            try:
                lock.acquire(blocking=False)
            except FileNotFoundError:
                # Another process, which had made the folder and written nothing into it, has just taken it away.
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
            with suppress(OSError):  # something lies in it
                each.rmdir()


def sweep(folder: Path) -> None:
    """Clears away what a killed process left in a folder whose work is done: nobody else will hold it any more."""
    if (folder / OWNER_FILE).exists():
        # Somebody may hold it after all, or this process have no right to write; then it stays.
        with suppress(InputError, OSError, RuntimeError), locked(folder):
            pass


def remove_abandoned(folder: Path) -> None:
    """Removes a folder that was :func:`locked` by a process which is dead; leaves it to one that is not."""
    # A RuntimeError is filelock's word for a lock that this very process holds.
    with suppress(InputError, RuntimeError):
        with locked(folder):
            for each in folder.iterdir():
                if each.is_dir():
                    shutil.rmtree(each)
        folder.rmdir()


def holds_nothing(folder: Path) -> bool:
    """Whether ``folder`` is missing, or empty but for a lock and for what a killed process left unfinished."""
    if not folder.exists():
        return True
    return all(each.name in (LOCK_FILE, OWNER_FILE) or is_unfinished(each) for each in folder.iterdir())


def _make(folder: Path) -> list[Path]:
    """Makes ``folder``; returns the folders that were not there, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return missing
        except FileExistsError:
            # Another process has taken an empty folder away between the two looks that mkdir takes.
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
    """What :func:`_this_process` wrote; nothing where there is no such file, or not yet."""
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
    """Whether the process that has left its name in ``folder`` is dead; the operating system gave us the lock.

    That settles it on this machine, unless the file system has no locks. Over several machines few network file
    systems are sure.
    """
    if not former:
        return
    here = _this_process()
    if former.get("slurm_job") is not None and former.get("slurm_job") == here["slurm_job"]:
        log.warning("going on in %s after %s of the same SLURM job", folder, _named(former))
    elif former.get("host") != here["host"]:
        raise InputError(
            f"{folder} was in use by {_named(former)}, and whether that process is alive cannot be seen from "
            f"{here['host']}; if it is not, delete {folder / OWNER_FILE} and give the same command again"
        )
    elif _is_alive(former):
        raise InputError(f"{folder} is in use by {_named(former)}; wait for it, or stop it")
    else:
        log.warning("going on in %s after %s, which is dead", folder, _named(former))


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the process is there, and no other one with its number."""
    try:
        start = psutil.Process(int(owner["pid"])).create_time()
        return abs(start - float(owner["process_start"])) < START_TOLERANCE
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False
