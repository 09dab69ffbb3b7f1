"""What options of several benchmarks may be."""

from __future__ import annotations

from collections.abc import Collection

import torch

from normfree.errors import InputError, unknown_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def usual_dtype(device: torch.device) -> str:
    """What models are mostly run in there."""
    return "fp32" if device.type == "cpu" else "bf16"


def check_dtype(name: str, allowed: Collection[str]) -> None:
    """Whether the benchmark can be run in ``name``.

    Raises:
        InputError: it is not ``allowed``.
    """
    if name not in allowed:
        raise unknown_name("dtype", name, allowed)


def check_at_least(least: int, **options: int) -> None:
    """Whether each of ``options``, by name, is large enough.

    Raises:
        InputError: one is less than ``least``.
    """
    for name, value in options.items():
        if value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")


def check_positive(**options: float) -> None:
    """Whether each of ``options``, by name, is a finite number above 0.

    Raises:
        InputError: one is not.
    """
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name} is {value}; it must be a finite number above 0")
