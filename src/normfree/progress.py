"""Progress of long work: bars on a terminal; in a log file or a notebook a line every half minute.

Long work names its stages with :func:`stage` or :func:`track`, and knows nothing of consoles. Whoever calls it chooses
once, with :func:`shown_on`, where they appear; by default nowhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

LINE_SECONDS = 30.0
"""Seconds between two lines where there is no terminal."""
T = TypeVar("T")
_SPEED_SECONDS = 600.0
"""Speed is the mean over this time: a run's first steps and its evaluations are slower than the others."""


def duration(seconds: float) -> str:
    """``seconds`` in the two largest units: ``45 s``, ``3 min 10 s``, ``2 h 05 min``, ``3 d 4 h``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"


def seconds_left(task: Task) -> float | None:
    """Seconds until ``task`` is done at its speed of the last minutes; None while that is unknown."""
    if task.total is None or task.remaining is None:
        return None
    speed = task.speed
    if not speed:  # fewer than two readings in those minutes: steps that take longer
        done = task.completed - task.fields["begun_at"]
        speed = done / task.elapsed if task.elapsed and done > 0 else None
    return None if not speed else max(0.0, task.remaining) / speed


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = seconds_left(task)
        return Text("" if left is None else f"{duration(left)} left", style="progress.remaining")


class Stage:
    """Work that is shown until it is closed; a context manager.

    Attributes:
        display: where it is shown.
    """

    def __init__(self, display: Display, description: str, total: float | None, done: float, unit: str) -> None:
        self.display = display
        self._id = display.begin(description, total, done, unit)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Shows the work no longer."""
        self.display.end(self._id)

    def advance(self, n: float = 1) -> None:
        """``n`` more units are done."""
        self.display.tasks.advance(self._id, n)

    def update(self, *, done: float | None = None, total: float | None = None, note: str | None = None) -> None:
        """Sets the units done, their total, or the note; what is None stays."""
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self.display.tasks.update(self._id, completed=done, total=total, **fields)

    @property
    def seconds_left(self) -> float | None:
        """See :func:`seconds_left`."""
        return seconds_left(self._task)

    @property
    def _task(self) -> Task:
        return next(task for task in self.display.tasks.tasks if task.id == self._id)


class Display:
    """The stages at work, shown on ``console``: nested ones below each other.

    Args:
        console: bars if it is a terminal; lines otherwise; nothing if it is quiet.
        clock: seconds; another one for tests.
        ticks: whether a thread prints the lines that are due; without it only :meth:`tick` does.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic, ticks: bool = True) -> None:
        self.console = console
        self.tasks = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=console,
            transient=True,
            get_time=clock,
            speed_estimate_period=_SPEED_SECONDS,
            disable=not console.is_terminal or console.quiet,
        )
        self._clock = clock
        self._has_thread = ticks and not console.is_terminal and not console.quiet
        self._last_line = clock()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, description: str, total: float | None, done: float, unit: str) -> Any:
        """Shows a stage, and returns the number that :meth:`end` takes."""
        if not self.tasks.tasks:
            self._start()
        fields: dict[str, Any] = {"note": "", "unit": unit, "begun_at": done}
        return self.tasks.add_task(description, total=total, completed=round(done), **fields)

    def end(self, task_id: Any) -> None:
        """Shows a stage no longer."""
        if task_id in self.tasks.task_ids:
            self.tasks.remove_task(task_id)
            if not self.tasks.tasks:
                self._stop()

    def close(self) -> None:
        """Ends all stages: an exception may have left some open, and with them the thread that prints lines."""
        for task_id in list(self.tasks.task_ids):
            self.end(task_id)

    def tick(self) -> None:
        """Prints a line if one is due and there is no terminal."""
        now = self._clock()
        if self.console.is_terminal or now - self._last_line < LINE_SECONDS:
            return
        self._last_line = now
        line = self.line()
        if line:
            self.say(line)

    def say(self, text: str) -> None:
        """A line as it is, above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def line(self) -> str:
        """Where the outermost and the innermost stage are, and the time left; empty without a stage."""
        tasks = self.tasks.tasks
        if not tasks:
            return ""
        whole = tasks[0]
        left = seconds_left(whole)
        parts = [_where(whole), f"{duration(whole.elapsed or 0.0)} so far"]
        parts += [] if left is None else [f"{duration(left)} left"]
        return "; ".join([", ".join(parts), *map(_where, tasks[-1:] if len(tasks) > 1 else [])])

    def _start(self) -> None:
        if not self.tasks.disable:
            self.tasks.start()
        elif self._has_thread:
            self._is_over.clear()
            self._thread = threading.Thread(target=self._tick_until_over, name="normfree-progress", daemon=True)
            self._thread.start()

    def _stop(self) -> None:
        if not self.tasks.disable:
            self.tasks.stop()
        if self._thread is not None:
            self._is_over.set()
            self._thread.join()
            self._thread = None

    def _tick_until_over(self) -> None:
        while not self._is_over.wait(1.0):
            try:
                self.tick()
            except (OSError, ValueError):  # nobody reads the console any more
                return


def _where(task: Task) -> str:
    """``training: 12 %, 18 of 150 steps, loss 3.21``."""
    counted = ""
    if task.fields["unit"]:
        of = "" if task.total is None else f" of {task.total:,.0f}"
        counted = f"{task.completed:,.0f}{of} {task.fields['unit']}"
    share = f"{task.percentage:.0f} %" if task.total else ""
    note = str(task.fields["note"])
    found = ", ".join(part for part in (share, counted, note) if part)
    return f"{task.description}: {found}" if found else task.description


_NOWHERE = Display(Console(quiet=True))
_display = _NOWHERE


def display() -> Display:
    """Where progress is shown now."""
    return _display


def show_on(console: Console) -> None:
    """Shows progress on ``console`` from now on, or until :func:`shown_on` ends around it: for commands."""
    global _display
    _display = Display(console)


@contextmanager
def shown_on(shown: Console | Display | None) -> Iterator[Display]:
    """Shows progress on a console, on a display of one's own, or nowhere; on exit ends all stages, then as before."""
    global _display
    before = _display
    _display = shown if isinstance(shown, Display) else _NOWHERE if shown is None else Display(shown)
    try:
        yield _display
    finally:
        ended, _display = _display, before
        if ended is not before:
            ended.close()


def stage(description: str, total: float | None = None, *, done: float = 0, unit: str = "") -> Stage:
    """Begins a stage of long work; close it, or use it as a context manager. ::

        with stage("evaluation", len(batches), unit="batches") as progress:
            for batch in batches:
                ...
                progress.advance()

    Args:
        description: what is being done.
        total: units of it; None if that is unknown.
        done: units done already, by an earlier session for instance; the time left does not count them.
        unit: what is counted, in the plural; "" counts in per cent only.
    """
    return Stage(_display, description, total, done, unit)


def track(items: Sequence[T], description: str, *, unit: str = "") -> Iterator[T]:
    """Yields ``items`` one after the other; each is done when the next is asked for."""
    with stage(description, len(items), unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()
