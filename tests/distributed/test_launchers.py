"""torchrun and accelerate, as a user calls them."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from normfree.training.run_folder import checkpoints, damage, last_checkpoint, step_of
from tests.forked import forked
from tests.nightly import NIGHTLY

from .launch import LONGEST
from .runs import assert_same_run

Command = Callable[..., tuple[object, ...]]
Launch = Callable[..., psutil.Process]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "normfree")
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "normfree")


@pytest.fixture
def launched() -> Iterator[Launch]:
    """Starts ``python -m`` in a fork, which has imported torch; what it started is gone when the test ends."""
    started: list[psutil.Process] = []

    def launch(output: Path, module: str, *arguments: object) -> psutil.Process:
        def job() -> None:
            os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
            sys.argv = [module, *map(str, arguments)]
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except Exception as error:  # the interpreter's exit code
                raise SystemExit(1) from error

        started.append(psutil.Process(forked(job, output)))
        return started[-1]

    yield launch
    for process in started:
        if process.is_running():
            for each in (*workers(process), process):
                each.kill()
            process.wait()


def workers(launcher: psutil.Process) -> list[psutil.Process]:
    """The processes that train."""
    found = launcher.children(recursive=True)
    return [each for each in found if "normfree" in each.cmdline() and "torch.distributed.run" not in each.cmdline()]


def wait_for_checkpoint(launcher: psutil.Process, output: Path, folder: Path, after: int) -> int:
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline and launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
        steps = [step_of(each) for each in checkpoints(folder)]
        if steps and max(steps) > after:
            return max(steps)
        time.sleep(0.05)
    raise AssertionError(output.read_text())


def test_torchrun(command: Command, tmp_path: Path, launched: Launch) -> None:
    """A process is killed, the same command resumes, and SIGTERM to the launcher saves; nothing hangs or stays."""
    arguments = (*TORCHRUN, *command("run", steps=100_000, eval_steps=100_000, sharding="full"))
    run, killed, stopped = (tmp_path / name for name in ("run", "killed", "stopped"))

    launcher = launched(killed, *arguments)
    step = wait_for_checkpoint(launcher, killed, run, after=4)
    started = workers(launcher)
    assert len(started) == 2
    next(each for each in started if each.environ()["RANK"] == "1").kill()
    assert launcher.wait(LONGEST) == 1
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)
    assert (
        "normfree: another of the 2 processes of this run is gone; the same command resumes from the last checkpoint"
        in killed.read_text()
    )

    launcher = launched(stopped, *arguments)
    step = wait_for_checkpoint(launcher, stopped, run, after=step + 4)
    started = workers(launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(LONGEST)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)
    message = "normfree: stopped by SIGTERM; the same command resumes from the last checkpoint: "
    assert stopped.read_text().count(message) == 1
    last = last_checkpoint(run)
    assert last is not None
    assert step_of(last) >= step
    assert step_of(last) == max(step_of(each) for each in checkpoints(run))
    assert damage(last) is None
    assert not (run / ".lock.json").exists()


@pytest.mark.skipif(not NIGHTLY, reason="make nightly: it starts as many processes as torchrun does, and more slowly")
def test_accelerate_launch(alone: Path, command: Command, tmp_path: Path, launched: Launch) -> None:
    output = tmp_path / "output"
    assert launched(output, *ACCELERATE, *command("run")).wait(LONGEST) == 0, output.read_text()
    assert_same_run(tmp_path / "run", alone)
