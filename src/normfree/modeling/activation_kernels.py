"""Statistics of activations by the compiled CPU kernels (csrc/activations.cpp)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from normfree import compiled
from normfree.compiled import ELEMENT_TYPES, address, sizes

NAME, INTERFACE = "activations", 2


def kernels_take(x: Tensor) -> bool:
    """True if compiled kernels exist for such activations: on the CPU, float32 or bfloat16."""
    on_cpu = x.device.type == "cpu" and x.dtype in ELEMENT_TYPES
    return on_cpu and compiled.library_refuses(NAME, INTERFACE) is None


def stream_sums(x: Tensor, sums: Tensor) -> None:
    """Fills ``sums``, float64 [11 + d], with sums over x [n_sequence, T, d], for which :func:`kernels_take` is true.

    Their order is that of :class:`normfree.probes.residual_stream.StreamStatistics`; they do not depend on the number
    of threads.
    """
    x = x.contiguous()
    compiled.library(NAME, INTERFACE).normfree_stream_sums(
        ELEMENT_TYPES[x.dtype], address(x), *sizes(*x.shape), address(sums), torch.get_num_threads()
    )


def count_nonzero(x: Tensor) -> int | None:
    """Number of nonzero entries of x, for which :func:`kernels_take` is true; None if one is NaN or infinite."""
    x = x.contiguous()
    count = compiled.library(NAME, INTERFACE).normfree_count_nonzero
    count.restype = ctypes.c_int64
    found = int(count(ELEMENT_TYPES[x.dtype], address(x), *sizes(x.numel()), torch.get_num_threads()))
    return None if found < 0 else found
