"""SIGTERM and Ctrl-C: a checkpoint, the command that resumes, and 128 + the signal."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from normfree.signals import Interrupted, deferred, note, noted, stopping_cleanly
from normfree.training.loop import Training
from normfree.training.run_folder import checkpoints, last_checkpoint
from tests.forked import normfree

from .crash import in_child
from .test_kill_and_resume import state_of

Command = Callable[[Path], tuple[object, ...]]
CLIP = Training.clip


class SignalAt:
    """Sends signals to its own process in the middle of a step, between its gradients and its update."""

    def __init__(self, step: int, *signals: signal.Signals) -> None:
        self.step = step
        self.signals = signals

    def send(self, training: Training) -> Any:
        if training.state.step == self.step:
            for each in self.signals:
                os.kill(os.getpid(), each)
        return CLIP(training)


def stopped(monkeypatch: pytest.MonkeyPatch, at: SignalAt) -> None:
    monkeypatch.setattr(Training, "clip", lambda training: at.send(training))


@pytest.mark.parametrize(("told", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_saves_itself_and_goes_on_as_if_nothing_had_happened(
    train_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: signal.Signals, code: int
) -> None:
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    command = normfree(*train_command(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        stopped(patch, SignalAt(6, told))
        ended = in_child(command, tmp_path / "stopped")
    assert ended.code == code, ended.output
    # Saved after the step that was being taken, and no other one was due there.
    checkpoint = last_checkpoint(tmp_path / "stopped" / "run")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-7"
    last = ended.output.strip().splitlines()[-1]
    assert last.startswith(f"normfree: stopped by {told.name}; the same command resumes from the last checkpoint: ")
    assert last.endswith(f"normfree train {' '.join(map(str, train_command(tmp_path / 'stopped')[1:]))}")
    assert "Traceback" not in ended.output

    assert in_child(command, tmp_path / "stopped").code == 0
    assert in_child(normfree(*train_command(tmp_path / "whole")), tmp_path / "whole").code == 0
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "whole")


def test_a_second_signal_stops_at_once(train_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, SignalAt(5, signal.SIGTERM, signal.SIGTERM))
    ended = in_child(normfree(*train_command(tmp_path)), tmp_path)
    assert ended.code == 143
    assert [each.name for each in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]


def test_while_nothing_trains_there_is_nothing_to_wait_for(
    train_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(config: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr("normfree.data.packing.open_corpus", told)
    ended = in_child(normfree(*train_command(tmp_path)), tmp_path)
    assert ended.code == 143
    assert ended.output.strip().splitlines()[-1].startswith("normfree: stopped by SIGTERM; ")
    assert "Traceback" not in ended.output
    assert not (tmp_path / "run").exists()


def test_the_handlers_that_were_there_are_there_again() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted), stopping_cleanly(), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert not noted()


def test_elsewhere_a_signal_is_obeyed_at_once() -> None:
    with pytest.raises(Interrupted, match="SIGINT"), stopping_cleanly():
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("n_own", "obeyed_after"), [(1, 1), (2, 1), (3, 1)])
def test_own_signal_after_that_of_another_process_is_no_second_one(n_own: int, obeyed_after: int) -> None:
    """A launcher signals all processes; the loop hears of a signal from the first of them that was reached."""
    survived = 0

    def work() -> None:
        nonlocal survived
        with stopping_cleanly(), deferred():
            note(signal.SIGTERM)
            for _ in range(n_own):
                os.kill(os.getpid(), signal.SIGTERM)
                survived += 1

    with pytest.raises(Interrupted):
        work()
    assert survived == obeyed_after
