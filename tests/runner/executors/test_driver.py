"""What a study makes of workers that die, fail, are busy or are told to stop; and of helpers beside it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from rich.console import Console

from normfree import devices
from normfree.locks import OWNER_FILE, locked
from normfree.runner import EXECUTORS
from normfree.runner.executors import Executor, Job, Settings, Task
from normfree.runner.worker import work_on
from normfree.training.loop import Training
from tests.faults.crash import in_child
from tests.faults.test_kill_and_resume import state_of
from tests.forked import normfree as normfree_job

from .conftest import STUDY

Command = Callable[..., tuple[int, str, str]]


class DoneJob(Job):
    """A task that ended while it was started."""

    where = "here"

    def is_done(self) -> bool:
        return True

    def end(self) -> str:
        return "was unplugged"


class HereExecutor(Executor):
    """Works on its tasks in this process, but for those that it loses, as often as ``lost`` says."""

    name = "slurm"
    settings_type = Settings
    poll_seconds = 0.01
    lost: ClassVar[dict[str, int]] = {}
    started: ClassVar[list[str]] = []

    def __init__(self, settings: Settings, workers: int | None) -> None:
        super().__init__(settings, workers)
        self.at_once = workers

    def __enter__(self) -> HereExecutor:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, tasks: Sequence[Task]) -> list[Job]:
        for task in tasks:
            self.started.append(task.place)
            if self.lost.get(task.place, 0) > 0:
                self.lost[task.place] -= 1
            else:
                work_on(*task.arguments)
        return [DoneJob() for _ in tasks]

    def stop(self, jobs: Sequence[Job], console: Console) -> None:
        console.print("stopped")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[HereExecutor]:
    """Takes the place of SLURM."""
    monkeypatch.setitem(EXECUTORS, "slurm", HereExecutor)
    monkeypatch.setattr(HereExecutor, "lost", {})
    monkeypatch.setattr(HereExecutor, "started", [])
    monkeypatch.setattr("normfree.runner.driver.LOOK_AGAIN_SECONDS", 0.1)
    return HereExecutor


def test_a_lost_run_is_tried_again_and_one_that_is_always_lost_is_named(
    study: Command, here: type[HereExecutor], whole: Path, tmp_path: Path
) -> None:
    here.lost.update({"runs/sm-ln-r/seed-0": 1, "runs/sm-g/seed-0": 99})
    code, out, err = study("--executor", "slurm", "--retries", "2")
    assert code == 1
    assert err.strip().splitlines()[-1] == (
        "normfree: 1 run failed: runs/sm-g/seed-0 (here was unplugged); the same command tries again"
    )
    assert "SM+LN+R seed 0: here was unplugged; tried again from step 0" in out
    assert "SM+G seed 0 failed: here was unplugged" in out
    assert here.started.count("runs/sm-ln-r/seed-0") == 2
    assert here.started.count("runs/sm-g/seed-0") == 3
    finished = pd.read_csv(tmp_path / "study" / "results.csv")["configuration"].tolist()
    assert finished == ["SM+LN+G", "SM+LN+R", "SM+R"]
    assert (tmp_path / "study" / "report.html").exists()

    here.lost.clear()
    here.started.clear()
    assert study("--executor", "slurm")[0] == 0
    assert here.started == ["runs/sm-g/seed-0"]
    assert state_of(tmp_path / "study") == state_of(whole)


def test_a_run_that_fails_by_itself_says_why_and_does_not_stop_the_others(
    study: Command, here: type[HereExecutor], half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Training.micro_step
    monkeypatch.setattr(Training, "micro_step", lambda self, *a, **k: breaks(self, step, *a, **k))
    code, out, err = study("--executor", "slurm", "--retries", "1")
    assert code == 1
    assert "runs/sm-g/seed-0 (ZeroDivisionError: for a test" in err
    assert out.count("; tried again from step 5") == 1
    assert "SM+R seed 0: finished on " in out
    assert here.started == ["runs/sm-g/seed-0", "runs/sm-r/seed-0", "runs/sm-g/seed-0"]


def breaks(trainer: Any, step: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The seventh step of SM+G."""
    config = trainer.model.config
    if trainer.state.step == 6 and config.norm == "none" and "gelu" in str(config.activation):
        raise ZeroDivisionError("for a test")
    return step(trainer, *arguments, **options)


def test_in_this_process_a_run_that_fails_does_not_stop_the_others_either(study: Command, half: Path) -> None:
    """The two runs that are left diverge at once, and may not."""
    code, out, err = study()
    assert code == 0, err
    options = ("--seeds", "0,1", "--set", "recipe.on_nonfinite=halt", "--set", "recipe.learning_rate=1e30")
    code, out, err = study("--out", "other", *options, "--set", "recipe.warmup_ratio=0")
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("normfree: 8 runs failed: runs/sm-ln-g/seed-0 (")
    assert out.count(" failed: ") == 8
    assert "No report: " in out


def test_a_worker_that_is_told_to_stop_saves_its_run_which_then_goes_on(
    study: Command, here: type[HereExecutor], half: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, told = Training.micro_step, iter([signal.SIGTERM])

    def signalled(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.step == 7:
            for each in told:
                os.kill(os.getpid(), each)
        return step(self, *arguments, **options)

    monkeypatch.setattr(Training, "micro_step", signalled)
    code, out, err = study("--executor", "slurm", "--retries", "0")
    assert code == 0, err
    assert "SM+G seed 0: stopped by SIGTERM (on " in out
    assert "; tried again from step 8" in out
    assert state_of(half) == state_of(whole)


def test_the_name_of_a_dead_worker_on_another_machine_does_not_keep_its_run(
    study: Command, here: type[HereExecutor], half: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempt is known to be over, so its name is taken away; one that nobody answers for is waited for."""
    run = half / "runs" / "sm-g" / "seed-0"
    claims = half / "workers" / "runs" / "sm-g" / "seed-0"
    owner = {"host": "node-7", "pid": 4711, "process_start": 0.0, "slurm_job": None, "since": "2026-01-01 00:00:00"}
    start = here.start

    def dies_on_another_machine(self: HereExecutor, tasks: Sequence[Task]) -> list[Job]:
        for task in tasks:
            if task.place == "runs/sm-g/seed-0" and not here.lost:
                here.lost[task.place] = 1
                report = {"state": "training", "host": "node-7", "pid": 4711, "step": 3}
                for folder in (run, claims):
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / OWNER_FILE).write_text(json.dumps(owner))
                (claims / f"{task.attempt}.json").write_text(json.dumps(report))
        return start(self, tasks)

    monkeypatch.setattr(here, "start", dies_on_another_machine)
    code, out, err = study("--executor", "slurm")
    assert code == 0, err
    assert "SM+G seed 0: here was unplugged; tried again from step 0" in out
    assert state_of(half) == state_of(whole)


def test_what_another_process_has_is_left_to_it(study: Command, here: type[HereExecutor], half: Path) -> None:
    claims = half / "workers" / "runs" / "sm-g" / "seed-0"
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(claims):
            os.write(write, b".")
            time.sleep(600)
        os._exit(0)
    os.read(read, 1)

    def killed_once_the_other_run_is_finished() -> None:
        while "runs/sm-r/seed-0" not in here.started:
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    killer = threading.Thread(target=killed_once_the_other_run_is_finished)
    killer.start()
    code, out, err = study("--executor", "slurm")
    killer.join()
    assert code == 0, err
    assert out.count("SM+G seed 0 is left to another process: ") == 1
    assert f"is in use by process {pid} on " in out
    assert here.started == ["runs/sm-r/seed-0", "runs/sm-g/seed-0"]


def test_a_helper_shares_the_runs_with_the_study_and_a_second_study_is_refused(
    study: Command, whole: Path, preset_path: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is trained once; the study waits in its first run until a helper has begun another one."""
    monkeypatch.setattr("normfree.runner.driver.LOOK_AGAIN_SECONDS", 0.1)
    folder, trained = tmp_path / "study", tmp_path / "trained"
    out = ("--out", folder, "--cache-dir", cache)
    begin = normfree_job("study", STUDY, "--preset", preset_path, *out)

    def counted(job: Callable[[], object]) -> Callable[[], object]:
        from normfree.runner import work as module

        work: Any = module

        train = work.train

        def noted(run: Any, *arguments: Any, **options: Any) -> Any:
            handle = os.open(trained, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, f"{run.configuration} {os.getpid()}\n".encode())
            os.close(handle)
            if len(trained.read_text().splitlines()) == 1:
                helpers.append(os.fork())
                if helpers[-1] == 0:
                    second = in_child(begin, tmp_path / "second")
                    helped = in_child(normfree_job("study-worker", folder), tmp_path / "helper")
                    os._exit(int((second.code, helped.code) != (2, 0) or "in use by process" not in second.output))
                while len(trained.read_text().splitlines()) == 1 and time.monotonic() < patience:
                    time.sleep(0.05)
            return train(run, *arguments, **options)

        def job_with_count() -> None:
            work.train = noted
            job()

        return job_with_count

    helpers: list[int] = []
    patience = time.monotonic() + 120

    def both() -> None:
        with pytest.raises(SystemExit) as stopped:
            counted(begin)()
        assert not stopped.value.code
        assert os.waitstatus_to_exitcode(os.waitpid(helpers[0], 0)[1]) == 0

    ended = in_child(both, tmp_path / "driver")
    assert ended.code == 0, ended.output + (tmp_path / "helper.output").read_text()
    lines = [line.rsplit(" ", 1) for line in trained.read_text().splitlines()]
    assert sorted(label for label, _ in lines) == ["SM+G", "SM+LN+G", "SM+LN+R", "SM+R"]
    assert len({process for _, process in lines}) == 2
    assert state_of(folder) == state_of(whole)


def test_runs_are_trained_on_the_device_of_the_study(
    study: Command, here: type[HereExecutor], half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normfree.runner import work as module

    work: Any = module
    train, seen = work.train, []

    def noted(run: Any, *arguments: Any, **options: Any) -> Any:
        seen.append((run.configuration, devices._chosen))
        return train(run, *arguments, **options)

    monkeypatch.setattr(work, "train", noted)
    assert study("--executor", "slurm", "--device", "cpu", "--only", "SM+G")[0] == 0
    assert study("--device", "cpu")[0] == 0
    assert seen == [("SM+G", torch.device("cpu")), ("SM+R", torch.device("cpu"))]
    assert devices._chosen is None


def test_a_helper_needs_a_study_that_somebody_trains(normfree: Command, half: Path) -> None:
    code, _, err = normfree("study-worker", half)
    assert code == 2
    assert "nobody is training the study in " in err
    code, _, err = normfree("study-worker", half / "runs")
    assert code == 2
    assert "is no study folder" in err
