"""Progress bars with the time left: one for the run that trains, one for the whole study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from normfree.columns import EVAL_LOSS, TRAIN_LOSS
from normfree.training.callback import Callback, RunState


def study_bars(console: Console) -> Progress:
    """Bars without a task yet; each task has a ``note``, and the time left."""
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        # The study's speed is judged over minutes: a run's first steps and its evaluations are slower.
        speed_estimate_period=600,
    )


class StudyProgress:
    """A context manager that shows the progress of one or more runs, counted in tokens.

    On a terminal two bars move; elsewhere (a log file) each evaluation prints a line.
    """

    def __init__(self, total_tokens: int, *, console: Console, description: str) -> None:
        self.console = console
        self._bars = study_bars(console)
        self._whole = self._bars.add_task(description, total=total_tokens, note="")
        self._skipped_tokens = 0

    def __enter__(self) -> StudyProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def skip(self, tokens: int) -> None:
        """Takes tokens that were trained on earlier out of the work ahead."""
        self._skipped_tokens += tokens
        task = self._bars.tasks[0]
        self._bars.update(self._whole, total=(task.total or 0) - tokens)

    def show(self, done_tokens: float, total_tokens: float, note: str) -> None:
        """Moves the whole bar to ``done_tokens`` of ``total_tokens``, both with the tokens of :meth:`skip`."""
        done, total = done_tokens - self._skipped_tokens, total_tokens - self._skipped_tokens
        self._bars.update(self._whole, completed=done, total=total, note=note)

    def run(self, description: str, tokens: int) -> RunProgress:
        """The callback that moves the bars while one run trains."""
        return RunProgress(self, self._bars, self._whole, description, tokens)


class RunProgress(Callback):
    """Moves the bars of a :class:`StudyProgress` while one run trains."""

    def __init__(self, study: StudyProgress, bars: Progress, whole: Any, description: str, tokens: int) -> None:
        self._study = study
        self._bars = bars
        self._whole = whole
        self._description = description
        self._tokens = tokens
        self._notes: dict[str, str] = {}

    def begin(self, run: RunState) -> None:
        self._per_step = self._tokens / run.n_steps
        done = round(run.step * self._per_step)
        self._task = self._bars.add_task(self._description, total=self._tokens, completed=done, note="")
        self._study.skip(done)

    def end_step(self, run: RunState) -> None:
        self._bars.advance(self._task, self._per_step)
        self._bars.advance(self._whole, self._per_step)

    def log(self, run: RunState, entries: Mapping[str, float]) -> None:
        if TRAIN_LOSS in entries:
            self._notes["train"] = f"loss {entries['train_loss']:.3f}"
        if EVAL_LOSS in entries:
            loss = entries[EVAL_LOSS]
            self._notes["eval"] = f"eval {loss:.3f}"
            if not self._study.console.is_terminal:
                self._study.console.print(
                    f"{self._description}: step {run.step}/{run.n_steps}, "
                    f"evaluation loss {loss:.4f} (perplexity {math.exp(min(loss, 700.0)):.2f})"
                )
        self._bars.update(self._task, note="  ".join(self._notes.values()))

    def finish(self, run: RunState) -> None:
        self._bars.remove_task(self._task)
