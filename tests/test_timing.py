"""Variants that take turns: everyone in every round, for long enough, and ratios of the same round."""

from __future__ import annotations

import pytest
import torch

from normfree import timing
from normfree.timing import interleaved, median_ratio

CPU = torch.device("cpu")


def test_every_variant_runs_in_every_round_for_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_SECONDS", 1.0)
    now, calls = 0.0, dict.fromkeys(("slow", "fast"), 0)

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        calls[name] += 1

    variants = {"slow": lambda: call("slow", 2.0), "fast": lambda: call("fast", 0.25)}
    seconds = interleaved(variants, 3, CPU, lambda: now)
    assert seconds == {"slow": [2.0] * 3, "fast": [0.25] * 3}
    # one call of each before the first round
    assert calls == {"slow": 1 + 3, "fast": 1 + 3 * 4}


def test_a_ratio_is_one_of_the_same_round() -> None:
    assert median_ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0
