"""A worker: a process that trains and measures one run of a study, and reports how far it is."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from normfree.columns import EVAL_LOSS
from normfree.errors import InputError, RunFailedError
from normfree.files import write_text
from normfree.runner.work import WORKERS_FOLDER, Report, State, open_work
from normfree.signals import Interrupted, stopping_cleanly
from normfree.training import Callback, RunState

REPORT_SECONDS = 2.0
"""Between two reports of a worker that trains."""


def work_on(path: str, place: str, attempt: str, reference: str) -> None:
    """One attempt at one run of the study in ``path``, in a process that some engine has started for it.

    ``reference`` is the name by which the driver found the study (see :func:`normfree.runner.find_study`). Never
    raises an Exception: its report says what became of the attempt. SIGTERM makes the run save itself.
    """
    folder = Path(path)
    reporting = Reporting(folder / WORKERS_FOLDER / place / f"{attempt}.json")
    try:
        with stopping_cleanly():
            work = open_work(folder, reference)
            planned = next(each for each in work.runs if each.place == place)
            try:
                work.train(planned, reporting)
                work.measure(planned, Console(stderr=True))
            except InputError as error:
                reporting.end("busy" if work.holder(planned) is not None else "refused", str(error))
                return
        reporting.end("finished")
    except InputError as error:
        reporting.end("refused", str(error))
    except (RunFailedError, OSError) as error:
        reporting.end("failed", str(error))
    except Interrupted as stop:
        reporting.end("stopped", str(stop))
    except Exception as error:
        traceback.print_exc()  # into the worker's log: nobody foresaw it
        reporting.end("failed", f"{type(error).__name__}: {error}")


class Reporting(Callback):
    """Keeps the report of one attempt, in a file, while it trains."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._report = Report("training", socket.gethostname(), os.getpid())
        self._written_at = float("-inf")

    def end(self, state: State, message: str = "") -> None:
        """Writes the last report."""
        self._write(state=state, message=" ".join(message.split()))

    def begin(self, run: RunState) -> None:
        self._write(step=run.step)

    def end_step(self, run: RunState) -> None:
        if time.monotonic() - self._written_at >= REPORT_SECONDS:
            self._write(step=run.step)

    def log(self, run: RunState, entries: Mapping[str, float]) -> None:
        if EVAL_LOSS in entries:
            self._write(step=run.step, eval_loss=entries[EVAL_LOSS])

    def _write(self, **changes: Any) -> None:
        self._report = Report(**{**asdict(self._report), **changes})
        self._written_at = time.monotonic()
        with suppress(OSError):  # no reason to end a run: the driver sees from the run's folder how it ended
            write_text(self._path, json.dumps(asdict(self._report)) + "\n")
