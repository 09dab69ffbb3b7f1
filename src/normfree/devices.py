"""Device and dtype of models, by the names that users give.

A device is chosen once, with :func:`on_device`, for all models that are loaded or trained meanwhile; by default CUDA
where there is a device, else the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from normfree.errors import InputError, unknown_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_chosen: torch.device | None = None


def default_device() -> torch.device:
    """What :func:`on_device` chose, or CUDA where there is a device, or the CPU."""
    if _chosen is not None:
        return _chosen
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def runs_on_cpu() -> bool:
    """What accelerate's ``cpu`` has to be: False leaves the choice of the accelerator to it."""
    return not torch.accelerator.is_available() if _chosen is None else _chosen.type == "cpu"


@contextmanager
def on_device(name: str | None) -> Iterator[None]:
    """Models are loaded and trained on the device ``name``; None leaves the choice as it is.

    Raises:
        InputError: see :func:`named_device`; or a number is given for one of several processes.
    """
    global _chosen
    before = _chosen
    if name is not None:
        _chosen = named_device(name)
        if _chosen.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _chosen = before
            raise InputError(f"the launcher gives each process a GPU of its own; give --device cuda in place of {name}")
        _settle(_chosen)
    try:
        yield
    finally:
        _chosen = before


def named_device(name: str) -> torch.device:
    """The device ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: it is none of these, or this machine does not have it.
    """
    check_device_name(name)
    kind, colon, number = name.partition(":")
    n = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and not n:
        raise InputError(f"device {name}: torch finds no CUDA device here; give --device cpu or leave it out")
    if colon and int(number) >= n:
        raise InputError(f"device {name}: this machine has {n} CUDA devices, cuda:0 to cuda:{n - 1}")
    return torch.device(name)


def check_device_name(name: str) -> None:
    """Checks that ``name`` is ``cpu``, ``cuda`` or ``cuda:N``, on this machine or another.

    Raises:
        InputError: it is none of these.
    """
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise InputError(f"unknown device {name!r}; give cpu, cuda or cuda:N")


def named_dtype(name: str | None) -> torch.dtype | None:
    """The dtype called ``fp32``, ``bf16`` or ``fp16``; None for None.

    Raises:
        InputError: it is none of these.
    """
    if name is not None and name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return None if name is None else DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of :data:`DTYPES`; torch's own for any other dtype."""
    return next((name for name, each in DTYPES.items() if each == dtype), str(dtype).removeprefix("torch."))


def _settle(device: torch.device) -> None:
    """Makes ``device`` the current one for accelerate, which holds on to the first choice of a process."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    from accelerate.state import AcceleratorState, PartialState

    state = PartialState._shared_state
    if state and int(os.environ.get("WORLD_SIZE", "1")) == 1 and PartialState().device.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
