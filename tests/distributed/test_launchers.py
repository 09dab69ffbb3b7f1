"""torchrun and accelerate, as a user calls them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from normfree.training.run_folder import checkpoints, damage, last_checkpoint, step_of
from tests.nightly import NIGHTLY

from .launch import LONGEST
from .runs import assert_same_run

Command = Callable[..., tuple[object, ...]]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "normfree")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "normfree")


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[[tuple[object, ...]], subprocess.Popen[str]]]:
    """Starts a command; what it started is gone when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def launch(command: tuple[object, ...]) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (tmp_path / "output").open("a") as output:
            process = subprocess.Popen(
                list(map(str, command)), stdout=output, stderr=output, text=True, env=environment, cwd=tmp_path
            )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            for each in (*workers(process), psutil.Process(process.pid)):
                each.kill()
            process.wait()


def workers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train."""
    found = psutil.Process(launcher.pid).children(recursive=True)
    return [each for each in found if "normfree" in each.cmdline() and "torch.distributed.run" not in each.cmdline()]


def wait_for_checkpoint(launcher: subprocess.Popen[str], folder: Path, after: int) -> int:
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline and launcher.poll() is None:
        steps = [step_of(each) for each in checkpoints(folder)]
        if steps and max(steps) > after:
            return max(steps)
        time.sleep(0.05)
    raise AssertionError((folder.parent / "output").read_text())


def test_torchrun(
    command: Command, tmp_path: Path, launched: Callable[[tuple[object, ...]], subprocess.Popen[str]]
) -> None:
    """A process is killed, the same command resumes, and SIGTERM to the launcher saves; nothing hangs or stays."""
    arguments = (*TORCHRUN, *command("run", steps=100_000, eval_steps=100_000, sharding="full"))
    run = tmp_path / "run"

    launcher = launched(arguments)
    step = wait_for_checkpoint(launcher, run, after=4)
    started = workers(launcher)
    assert len(started) == 2
    next(each for each in started if each.environ()["RANK"] == "1").kill()
    assert launcher.wait(LONGEST) == 1
    output = (tmp_path / "output").read_text()
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)
    assert (
        "normfree: another of the 2 processes of this run is gone; the same command resumes from the last checkpoint"
        in output
    )

    launcher = launched(arguments)
    step = wait_for_checkpoint(launcher, run, after=step + 4)
    started = workers(launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(LONGEST)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)
    output = (tmp_path / "output").read_text()
    assert output.count("normfree: stopped by SIGTERM; the same command resumes from the last checkpoint: ") == 1
    last = last_checkpoint(run)
    assert last is not None
    assert step_of(last) >= step
    assert step_of(last) == max(step_of(each) for each in checkpoints(run))
    assert damage(last) is None
    assert not (run / ".lock.json").exists()


@pytest.mark.skipif(not NIGHTLY, reason="make nightly: it starts as many processes as torchrun does, and more slowly")
def test_accelerate_launch(
    alone: Path, command: Command, tmp_path: Path, launched: Callable[[tuple[object, ...]], subprocess.Popen[str]]
) -> None:
    launcher = launched((*ACCELERATE, *command("run")))
    assert launcher.wait(LONGEST) == 0, (tmp_path / "output").read_text()
    assert_same_run(tmp_path / "run", alone)
