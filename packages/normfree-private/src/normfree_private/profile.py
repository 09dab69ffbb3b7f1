"""The profile that the engine prints of each run: the only place where it reports what it sent."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOTAL_TIME = re.compile(r"\[Profiling\] SPU execution .* total time (?P<seconds>[0-9.e+-]+)s")
_LINK = re.compile(
    r"Link details: total send bytes (?P<bytes_sent>\d+), recv bytes (?P<bytes_received>\d+), "
    r"send actions (?P<messages_sent>\d+), recv actions (?P<messages_received>\d+)"
)


@dataclass(frozen=True)
class RunProfile:
    """One run of a program, as one party saw it.

    What was sent repeats exactly from run to run. What was received is what was read when the run ended: if parties run
    ahead of each other, a message can count in the next run.
    """

    seconds: float
    bytes_sent: int
    bytes_received: int
    messages_sent: int
    messages_received: int


def parse_profiles(text: str) -> list[RunProfile]:
    """The runs in a party's standard output, in order.

    Raises:
        ValueError: a run has no link details, or link details have no run.
    """
    profiles: list[RunProfile] = []
    seconds: float | None = None
    for line in text.splitlines():
        if time := _TOTAL_TIME.search(line):
            if seconds is not None:
                raise ValueError(f"a run without link details, before: {line}")
            seconds = float(time["seconds"])
        elif link := _LINK.search(line):
            if seconds is None:
                raise ValueError(f"link details without a run: {line}")
            profiles.append(RunProfile(seconds, **{name: int(value) for name, value in link.groupdict().items()}))
            seconds = None
    if seconds is not None:
        raise ValueError("the last run has no link details")
    return profiles
