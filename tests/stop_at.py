"""A run that is interrupted."""

from __future__ import annotations

from normfree.training import Callback, RunState


class StopAt(Callback):
    """Interrupts a run after a step, before anything more is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def end_step(self, run: RunState) -> None:
        if run.step == self.step:
            raise KeyboardInterrupt
