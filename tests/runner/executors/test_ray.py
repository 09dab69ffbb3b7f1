"""A real Ray cluster of this machine, with a worker killed in the middle of its run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from normfree.runner.work import read_report
from normfree.training.run_folder import checkpoints, step_of
from tests.faults.test_kill_and_resume import state_of

from .conftest import SAVE_STEPS

Command = Callable[..., tuple[int, str, str]]


class Killer(threading.Thread):
    """Kills the first worker that has saved a checkpoint of its run."""

    def __init__(self, study: Path) -> None:
        super().__init__(daemon=True)
        self.study = study
        self.killed: list[tuple[str, int, int]] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.killed and not self.over.is_set():
            for path in self.study.glob("workers/runs/*/*/[0-9a-f]*.json"):
                report = read_report(path.parent, path.stem)
                place = path.parent.relative_to(self.study / "workers").as_posix()
                saved = [step_of(each) for each in checkpoints(self.study / place)]
                if report is not None and report.state == "training" and saved:
                    os.kill(report.pid, signal.SIGKILL)
                    self.killed.append((place, report.pid, max(saved)))
                    break
            time.sleep(0.005)


def test_a_study_with_a_killed_worker_leaves_what_one_process_does(
    study: Command, half: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    killer = Killer(half)
    killer.start()
    before = signal.getsignal(signal.SIGTERM)
    code, out, err = study("--executor", "ray", "--workers", "2")
    killer.over.set()
    killer.join()
    assert code == 0, out + err
    assert signal.getsignal(signal.SIGTERM) == before

    ((place, _, step),) = killer.killed
    (again,) = [line for line in out.splitlines() if "; tried again from step " in line]
    assert int(again.rsplit(" ", 1)[1]) >= step >= SAVE_STEPS
    assert len([line for line in out.splitlines() if ": Ray task " in line and "tried again" not in line]) == 3
    assert out.count(": finished on ") == 2
    assert not (half / "workers").exists()
    assert (half / place / "results.csv").exists()
    assert state_of(half) == state_of(whole)
