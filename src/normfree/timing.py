"""Paired timings: variants alternate in one process, so that machine drift affects all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

MIN_SECONDS = 0.05
"""Shortest time for which a variant is repeated in a round."""

Call = Callable[[], Any]
Clock = Callable[[], float]


def seconds_once(call: Call, device: torch.device) -> float:
    """Wall-clock seconds of one call, the work that it leaves to ``device`` included."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds_a_call(call: Call, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Mean seconds per call, repeated for at least ``MIN_SECONDS``."""
    start, n_call = clock(), 0
    while n_call == 0 or clock() - start < MIN_SECONDS:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        n_call += 1
    return (clock() - start) / n_call


def interleaved(
    calls: Mapping[str, Call], rounds: int, device: torch.device, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per call of each variant in each round; a round runs every variant once, in a new random order."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            seconds[name].append(seconds_a_call(calls[name], device, clock))
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)
