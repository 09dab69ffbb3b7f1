"""Processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normfree.devices import on_device
from normfree.errors import InputError
from normfree.runner.executors import Task
from normfree.runner.executors.local import LocalExecutor, LocalSettings
from tests.faults.crash import in_child
from tests.faults.test_kill_and_resume import state_of
from tests.forked import normfree as normfree_job
from tests.nightly import NIGHTLY

from .conftest import STUDY

Command = Callable[..., tuple[int, str, str]]


def test_two_workers_leave_what_one_process_does(study: Command, half: Path, whole: Path) -> None:
    code, out, err = study("--workers", "2", "--executor-set", "cpus=1")
    assert code == 0, out + err
    assert out.count(": process ") == 2
    assert out.count(": finished on ") == 2
    assert "seed 0: finished on" in out
    assert "(4 of 4)" in out
    assert state_of(half) == state_of(whole)


class NeverEnding:
    """Stands for a process, and keeps what it was begun with."""

    pid = 1
    returncode = 0

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        self.env = env

    def poll(self) -> None:
        return None

    def wait(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        ("0,1,2,3,4,5,6,7", None, ["0", "1", "2", "3", "4", "5", "6", "7"]),
        ("GPU-a,GPU-b", 0.25, ["GPU-a", "GPU-b"] * 4),
        ("0,1", 0, [""] * 8),
        ("", None, [None] * 8),
    ],
)
def test_every_worker_has_its_own_gpu_and_its_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, gpus: float | None, expected: list[str | None]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32), raising=False)
    monkeypatch.setattr(subprocess, "Popen", NeverEnding)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(visible))
    with LocalExecutor(LocalSettings(gpus=gpus), 8) as executor:
        jobs = executor.start([Task(tmp_path, f"runs/a/seed-{seed}", "x", STUDY) for seed in range(8)])
    environments = [job.process.env for job in jobs]  # type: ignore[attr-defined]
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in environments] == expected
    assert {each["OMP_NUM_THREADS"] for each in environments} == {"4"}


def test_workers_of_a_study_on_the_cpu_share_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match="2 workers with 1 of a GPU each need more"), LocalExecutor(LocalSettings(), 2):
        pytest.fail("they were chosen")
    with on_device("cpu"), LocalExecutor(LocalSettings(), 2) as executor:
        assert executor._devices == ["", ""]


@pytest.mark.skipif(not NIGHTLY, reason="a minute of starting processes")
def test_ctrl_c_saves_all_runs_and_the_same_command_goes_on(
    study: Command, preset_path: Path, cache: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    options = ("--workers", "2", "--executor-set", "cpus=1", "--out", folder, "--cache-dir", cache)
    job = normfree_job("study", STUDY, "--preset", preset_path, *options)

    def interrupted() -> None:
        def sleep(seconds: float) -> None:
            if list(folder.glob("runs/*/*/checkpoint-*")):
                os.kill(os.getpid(), signal.SIGINT)

        time.sleep = sleep  # type: ignore[assignment]
        job()

    ended = in_child(interrupted, tmp_path / "stopped")
    assert ended.code == 130, ended.output
    assert "2 workers save their runs and stop" in ended.output
    assert not list(folder.rglob(".lock.json"))
    assert study("--workers", "2", "--executor-set", "cpus=1")[0] == 0
    assert state_of(folder) == state_of(whole)
