"""What benchmarks share: the device, dtypes, checks of options, and what every result says of its machine."""

from __future__ import annotations

import contextlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from normfree.errors import InputError, unknown_name
from normfree.timing import Clock, seconds_once

MODEL_DTYPES = ("fp32", "bf16")
"""Dtypes that whole models are measured in."""


def clock_of(device: torch.device) -> Clock:
    """Processor time for one CPU thread, which other work on the machine does not lengthen; else wall-clock time."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def choose_dtype(name: str | None, device: torch.device, allowed: Collection[str] = MODEL_DTYPES) -> str:
    """``name``; None means fp32 on a CPU and bf16 on a GPU.

    Raises:
        InputError: it is not ``allowed``.
    """
    chosen = name or ("fp32" if device.type == "cpu" else "bf16")
    if chosen not in allowed:
        raise unknown_name("dtype", chosen, allowed)
    return chosen


def check_at_least(least: int, **options: int) -> None:
    """Checks that each of ``options``, by name, is at least ``least``.

    Raises:
        InputError: one is not.
    """
    for name, value in options.items():
        if value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")


def check_positive(**options: float) -> None:
    """Checks that each of ``options``, by name, is a finite number above 0.

    Raises:
        InputError: one is not.
    """
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name} is {value}; it must be a finite number above 0")


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best rate of a product of two matrices [size, size], in FLOP/s."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_once(lambda: a @ b, device) for _ in range(10))


def surroundings(device: torch.device, description: str | None = None) -> dict[str, str]:
    """``command`` (for a shell), ``device`` (or its ``description``), ``processor``, versions."""
    program = Path(sys.argv[0]).name
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["normfree" if program == "__main__.py" else program, *sys.argv[1:]]),
        "device": description or name,
        "processor": _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name, as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def milliseconds(seconds: Mapping[str, list[float]], digits: int = 3) -> dict[str, float]:
    """The median over the rounds of each variant, rounded to ``digits``."""
    return {name: round(1000 * statistics.median(each), digits) for name, each in seconds.items()}
