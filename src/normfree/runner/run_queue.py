"""The states of a study's runs, without processes or files: which can begin, are at work, finished or failed."""

from __future__ import annotations

from collections.abc import Sequence

from normfree.runner.run_order import PlannedRun


class RunQueue:
    """The runs of a study, each of them waiting, at work, finished or failed permanently.

    A run waits for those that it requires. A failed run is retried, up to ``retries`` times without a new checkpoint in
    between: a run that progresses between failures, as on preemptible machines, is trained to its end. Runs that
    require one that failed permanently fail with it.

    Attributes:
        runs: all of them, by place.
        finished: places of the finished ones.
        failures: reasons of permanent failures, by place.
    """

    def __init__(self, runs: Sequence[PlannedRun], *, retries: int) -> None:
        self.runs = {planned.place: planned for planned in runs}
        self.finished: set[str] = set()
        self.failures: dict[str, str] = {}
        self._retries = retries
        self._at_work: set[str] = set()
        self._tries: dict[str, tuple[int, int]] = {}

    @property
    def is_over(self) -> bool:
        """True if every run is finished or has failed permanently."""
        return len(self.finished) + len(self.failures) == len(self.runs)

    def ready(self) -> list[PlannedRun]:
        """The runs that can begin now, in order."""
        taken = self.finished | self.failures.keys() | self._at_work
        return [
            planned
            for place, planned in self.runs.items()
            if place not in taken and self.finished.issuperset(planned.requires)
        ]

    def begin(self, place: str) -> None:
        """Marks a run as at work."""
        self._at_work.add(place)

    def put_back(self, place: str) -> None:
        """Marks a run as waiting again: another process has it."""
        self._at_work.discard(place)

    def finish(self, place: str) -> None:
        """Marks a run as finished."""
        self._at_work.discard(place)
        self.finished.add(place)

    def fail(
        self, place: str, reason: str, *, step: int = 0, for_good: bool = False, was_stopped: bool = False
    ) -> bool:
        """Records a failure after the checkpoint of ``step``; returns True if the run is to be retried.

        A worker that ``was_stopped``, by its job's time limit for instance, has not failed if the run progressed.
        """
        self._at_work.discard(place)
        former_step, tries = self._tries.get(place, (-1, 0))
        tries = tries + 1 if step <= former_step else int(not was_stopped)
        self._tries[place] = (step, tries)
        if not for_good and tries <= self._retries:
            return True
        self._give_up(place, reason)
        return False

    def _give_up(self, place: str, reason: str) -> None:
        self.failures[place] = reason
        for planned in self.runs.values():
            if place in planned.requires and planned.place not in self.failures:
                self._give_up(planned.place, f"not trained, because {self.runs[place].label} failed")
