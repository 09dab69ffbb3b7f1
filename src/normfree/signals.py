"""Ctrl-C and SIGTERM: deferred while a model trains, so that it can save a checkpoint; immediate elsewhere."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """``signal`` asked the process to stop. Like KeyboardInterrupt, not an Exception."""

    def __init__(self, signal_: signal.Signals) -> None:
        super().__init__(f"stopped by {signal_.name}")
        self.signal = signal_


class _Request:
    """The pending signal of this process."""

    noted: signal.Signals | None = None
    is_own = False
    """False for a signal that only another process of the run has received so far."""
    is_deferred = False


@contextmanager
def stopping_cleanly() -> Iterator[None]:
    """While active, SIGINT and SIGTERM raise :class:`Interrupted`, or are noted (see :func:`deferred`).

    A second signal always raises it. Restores the previous handlers on exit. Only the main thread receives signals: in
    others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, _note) for each in SIGNALS}
    try:
        yield
    finally:
        _Request.noted = None
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """While active, a first signal is only noted (see :func:`noted`); it is raised at the end of the block."""
    before, _Request.is_deferred = _Request.is_deferred, True
    try:
        yield
    finally:
        _Request.is_deferred = before
    if _Request.noted is not None:
        raise Interrupted(_Request.noted)


def noted() -> int:
    """The number of the pending signal; 0 if there is none."""
    return int(_Request.noted or 0)


def note(number: int) -> None:
    """Notes a signal that another process of this run received."""
    if _Request.noted is None:
        _Request.noted, _Request.is_own = signal.Signals(number), False


def _note(number: int, frame: FrameType | None) -> None:
    # A launcher signals every process: this one may have heard of it from another before its own signal arrives.
    is_second = _Request.noted is not None and _Request.is_own
    _Request.noted, _Request.is_own = signal.Signals(number), True
    if is_second or not _Request.is_deferred:
        raise Interrupted(_Request.noted)
    print(
        f"normfree: {_Request.noted.name}: saving a checkpoint after this step (once more to stop at once)",
        file=sys.stderr,
        flush=True,
    )
