"""Garbage collection in a process that runs Normfree and nothing else: the command line, a worker."""

from __future__ import annotations

import atexit
import gc

THRESHOLDS = (20_000, 50, 100)
"""For :func:`gc.set_threshold`. What importing torch and transformers makes stays: Python's own thresholds traverse it
again and again, which is a fifth of the time that a process takes to begin."""


def collect_less() -> None:
    """Collects garbage less often, and not at exit, when the operating system frees everything at once."""
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)
