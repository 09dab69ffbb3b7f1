"""The C++ kernels for CPUs (csrc/), compiled while normfree is installed where there is a compiler.

They are found and loaded through ctypes, and called with the addresses of tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARIES = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}
"""The libraries that a CPU can run, the fastest first, by the name that torch has for its instructions."""

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of the elements that kernels read, and their numbers in csrc."""
WIDENED = (torch.float16,)
"""Dtypes that kernels read after :func:`widened`."""


class NotCompiledError(Exception):
    """Why compiled kernels cannot be used, in one line."""


def library(name: str, interface: int) -> ctypes.CDLL:
    """The kernels of ``csrc/NAME.cpp`` for this CPU; ``interface`` is what ``normfree_interface()`` has to return.

    Raises:
        NotCompiledError: there are none that it can run.
    """
    found = _library_or_reason(name, interface)
    if isinstance(found, str):
        raise NotCompiledError(found)
    return found


def library_refuses(name: str, interface: int) -> str | None:
    """Why these kernels cannot be used on this machine; None if they can."""
    found = _library_or_reason(name, interface)
    return found if isinstance(found, str) else None


def forget() -> None:
    """Look for the libraries again."""
    _library_or_reason.cache_clear()


@cache
def _library_or_reason(name: str, interface: int) -> ctypes.CDLL | str:
    folder = Path(__file__).parent
    instructions = LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), ("default",))
    found = [path for each in instructions if (path := folder / f"{name}_{each}.so").exists()]
    if not found:
        return "its kernels were not compiled: install normfree where there is a C++ compiler"
    try:
        kernels = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"its kernels could not be loaded: {error}"
    if kernels.normfree_interface() != interface:
        return "its kernels were compiled from other sources: install normfree again"
    return kernels


class Address(ctypes.c_void_p):
    """An argument of a kernel. It keeps its tensor: a copy made for the call would be freed before it."""

    def __init__(self, value: int | None, tensor: Tensor | None) -> None:
        super().__init__(value)
        self.tensor = tensor


def address(tensor: Tensor | None, place: int = 0) -> Address:
    """Address of a tensor element, by storage offset; null without a tensor."""
    return Address(None if tensor is None else tensor.data_ptr() + place * tensor.element_size(), tensor)


def widened(tensor: Tensor) -> Tensor:
    """float16 as float32, which holds all of its numbers; any other tensor itself."""
    return tensor.float() if tensor.dtype in WIDENED else tensor


def sizes(*sizes: int) -> Sequence[ctypes.c_int64]:
    """Sizes as separate arguments of a kernel."""
    return [ctypes.c_int64(size) for size in sizes]


def size_array(*sizes: int) -> ctypes.Array[ctypes.c_int64]:
    """Sizes as one argument of a kernel, an array."""
    return (ctypes.c_int64 * len(sizes))(*sizes)
