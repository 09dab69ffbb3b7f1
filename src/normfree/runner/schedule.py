"""Which runs of a plan can begin, and what became of the others; it knows nothing of processes or files."""

from __future__ import annotations

from collections.abc import Sequence

from normfree.runner.plan import PlannedRun


class Schedule:
    """The runs of a plan, each of them waiting, at work, finished or failed for good.

    A run waits for those that it requires. One that fails is tried again, unless it has failed more than ``retries``
    times with no new checkpoint in between: a run that gets on between its failures, as on machines that are taken
    away again and again, comes to its end. What requires a run that failed for good fails with it.
    """

    def __init__(self, plan: Sequence[PlannedRun], *, retries: int) -> None:
        self.plan = {planned.place: planned for planned in plan}
        self.finished: set[str] = set()
        self.failures: dict[str, str] = {}
        """Why, by place."""
        self._retries = retries
        self._at_work: set[str] = set()
        self._tries: dict[str, tuple[int, int]] = {}

    @property
    def is_over(self) -> bool:
        """Whether every run is finished or has failed for good."""
        return len(self.finished) + len(self.failures) == len(self.plan)

    def ready(self) -> list[PlannedRun]:
        """Those that can begin now, in the plan's order."""
        taken = self.finished | self.failures.keys() | self._at_work
        return [
            planned
            for place, planned in self.plan.items()
            if place not in taken and self.finished.issuperset(planned.requires)
        ]

    def begin(self, place: str) -> None:
        """It is at work now."""
        self._at_work.add(place)

    def put_back(self, place: str) -> None:
        """It is waiting again: somebody else has it, or it was stopped."""
        self._at_work.discard(place)

    def finish(self, place: str) -> None:
        """It is finished."""
        self._at_work.discard(place)
        self.finished.add(place)

    def fail(
        self, place: str, reason: str, *, step: int = 0, for_good: bool = False, was_stopped: bool = False
    ) -> bool:
        """It failed, with ``step`` as that of its last checkpoint; returns whether it is to be tried again.

        That its worker ``was_stopped``, at the end of a job's time for instance, is no failure if it got on.
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
        for planned in self.plan.values():
            if place in planned.requires and planned.place not in self.failures:
                self._give_up(planned.place, f"not trained, because {self.plan[place].label} failed")
