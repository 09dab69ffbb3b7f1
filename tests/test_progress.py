"""Progress where there is no terminal: which lines are printed when, by a clock of the test's own."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from normfree import progress
from normfree.progress import Display, duration, shown_on, stage, track
from normfree.training import StudyProgress


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log:
    """A display on a file, and what is in it."""

    def __init__(self, *, quiet: bool = False, terminal: bool = False) -> None:
        self.clock, self.file = Clock(), io.StringIO()
        console = Console(file=self.file, quiet=quiet, force_terminal=terminal, width=110)
        self.display = Display(console, clock=self.clock, ticks=False)

    def after(self, seconds: float) -> str:
        """What is printed once ``seconds`` have passed."""
        before = len(self.file.getvalue())
        self.clock.now += seconds
        self.display.tick()
        return self.file.getvalue()[before:]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s")),
        *((3600, "1 h 00 min"), (7500, "2 h 05 min"), (86400 * 3 + 4 * 3600 + 100, "3 d 4 h")),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_every_half_minute_has_the_time_left() -> None:
    log = Log()
    with shown_on(log.display), stage("training", 100, unit="steps") as training:
        assert log.after(29) == ""
        assert log.after(1) == "training: 0 %, 0 of 100 steps, 30 s so far\n"
        training.advance(10)
        assert log.after(29) == ""
        training.advance(10)
        # 20 steps in a minute, less the 29 s that one reading took.
        assert log.after(1) == "training: 20 %, 20 of 100 steps, 1 min 00 s so far, 3 min 52 s left\n"
        training.update(note="loss 2.5")
        assert log.after(600).startswith("training: 20 %, 20 of 100 steps, loss 2.5, 11 min 00 s so far, ")
    assert log.after(60) == ""


def test_the_time_left_does_not_count_what_an_earlier_session_did() -> None:
    log = Log()
    with shown_on(log.display), stage("training", 1000, done=900) as training:
        log.clock.now += 40
        training.advance(20)
        assert training.seconds_left == pytest.approx(160)  # 80 left at 20 in 40 s
        assert "92 %" in log.after(0)


def test_steps_longer_than_the_period_of_the_speed_have_a_time_left() -> None:
    log = Log()
    with shown_on(log.display), stage("training", 10) as training:
        for _ in range(3):
            log.clock.now += 1500
            training.advance()
        assert training.seconds_left == pytest.approx(7 * 1500)


def test_lines_name_the_whole_and_what_is_at_work_within_it() -> None:
    log = Log()
    with shown_on(log.display), stage("study", 4, unit="runs") as whole:
        whole.advance()
        with stage("sm-r seed 0", 50, unit="steps"), stage("evaluation [1/2]"):
            assert log.after(30) == "study: 25 %, 1 of 4 runs, 30 s so far, 1 min 30 s left; evaluation [1/2]\n"
        assert "sm-r" not in log.after(30)


def test_many_short_stages_print_lines_too() -> None:
    log, printed = Log(), ""
    with shown_on(log.display):
        for i in range(5):
            with stage(f"layer {i}"):
                printed += log.after(20)
    assert printed == "layer 1: 20 s so far\nlayer 3: 20 s so far\n".replace(": 20", ", 20")


def test_work_without_a_total_counts_what_is_done() -> None:
    log = Log()
    with shown_on(log.display), stage("packing", unit="tokens") as packing:
        packing.update(done=1_234_567)
        assert log.after(31) == "packing: 1,234,567 tokens, 31 s so far\n"


def test_track_counts_items_and_ends_with_them() -> None:
    log, lines = Log(), []
    with shown_on(log.display):
        lines = [log.after(30) for _ in track([1, 2], "models", unit="models")]
        assert progress.display().line() == ""
    assert lines == [
        "models: 0 %, 0 of 2 models, 30 s so far\n",
        "models: 50 %, 1 of 2 models, 1 min 00 s so far, 1 min 00 s left\n",
    ]


def test_an_error_ends_its_stages() -> None:
    log = Log()
    with shown_on(log.display):
        with pytest.raises(ZeroDivisionError), stage("outer"), stage("inner"):
            _ = 1 / 0
        assert progress.display().line() == ""


def test_nothing_is_shown_by_default_or_on_a_quiet_console(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(quiet=True)
    with stage("alone", 2) as alone:
        alone.advance()
        progress.display().tick()
    with shown_on(log.display), stage("quiet"):
        assert log.after(100) == ""
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_bars_and_no_lines() -> None:
    log = Log(terminal=True)
    with shown_on(log.display), stage("training [a]", 10, unit="steps") as training:
        log.clock.now += 5
        training.advance(5)
        log.display.tasks.refresh()
        shown = log.file.getvalue()
        assert "training [a]" in shown
        assert "50%" in shown
        assert "so far" not in log.after(100)


def test_a_thread_prints_while_the_work_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    file = io.StringIO()
    with shown_on(Console(file=file)), stage("one long step"):
        end = time.monotonic() + 20
        while not file.getvalue() and time.monotonic() < end:
            time.sleep(0.05)
    assert file.getvalue().startswith("one long step, ")


def _interrupted_study() -> None:
    state: Any = SimpleNamespace(step=0, n_steps=5, plan=None)
    stage("never closed", 3)
    with StudyProgress(10.0, "study") as study:
        study.run("run", 10.0).begin(state)
        raise KeyboardInterrupt


def test_stages_left_open_by_an_error_end_with_their_display() -> None:
    with pytest.raises(KeyboardInterrupt), shown_on(Console(file=io.StringIO())) as shown:
        _interrupted_study()
    assert shown.line() == ""
    assert shown._thread is None


def test_a_run_that_goes_back_lengthens_the_work_by_what_it_repeats() -> None:
    log = Log()
    state: Any = SimpleNamespace(step=4, n_steps=10, plan=None)  # resumed: four steps are no work ahead
    with shown_on(log.display), StudyProgress(100.0, "study") as study:
        run = study.run("run", 100.0)
        run.begin(state)
        for n_step in (5, 2):  # to step 9
            for _ in range(n_step):
                run.end_step(state)
            state.step = 7
            run.begin(state)
        for _ in range(3):
            run.end_step(state)
        assert "100 %, 100 of 100 tokens" in log.after(60)
