"""The stages of progress that code begins, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from normfree.progress import Display, shown_on


class _Recording(Display):
    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.begun: list[str] = []

    def begin(self, description: str, *rest: Any) -> Any:
        self.begun.append(description)
        return super().begin(description, *rest)


@contextmanager
def recorded_stages() -> Iterator[list[str]]:
    """Descriptions of the stages that begin in the ``with`` block; afterwards all of them have ended."""
    display = _Recording()
    with shown_on(display):
        yield display.begun
    assert display.line() == "", "a stage was not closed"
