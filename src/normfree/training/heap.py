"""The C library's heap in a process that trains."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""
LARGEST_BLOCK, MOST_KEPT = 1 << 25, 1 << 30
"""Bytes: what glibc at most takes from the heap, and what a process keeps of free memory at the heap's end."""


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that each step frees and allocates again; other C libraries are left alone.

    By default it returns much of it to the system, which zeroes it page by page for the next step: a tenth of a small
    model's step.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
