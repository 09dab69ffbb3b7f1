"""Statistics of activations by the compiled CPU kernels (csrc/activations.cpp)."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from normfree import compiled
from normfree.compiled import address, sizes

NAME, INTERFACE = "activations", 1
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1}


class StreamSums(NamedTuple):
    """Sums over activations x [n_sequence, T, d].

    channel_squares: Σ x² over tokens, float64 [d].
    directions: |Σ_t x_t / |x_t||² of each sequence, float64 [n_sequence].
    moments: the mean μ of all entries and Σ (x − μ)^p, p = 2, 3, 4: float64 [4].
    nonfinite: numbers of NaN and of infinite entries, int64 [2].
    """

    channel_squares: Tensor
    directions: Tensor
    moments: Tensor
    nonfinite: Tensor


def kernels_take(x: Tensor) -> bool:
    """Whether there are compiled kernels for such activations: on the CPU, float32 or bfloat16."""
    on_cpu = x.device.type == "cpu" and x.dtype in ELEMENT_TYPES
    return on_cpu and compiled.library_refuses(NAME, INTERFACE) is None


def stream_sums(x: Tensor) -> StreamSums:
    """The sums of x [n_sequence, T, d], which :func:`kernels_take`, in float64; the same whatever the threads."""
    x = x.contiguous()
    sums = StreamSums(
        torch.zeros(x.shape[2], dtype=torch.float64),
        torch.empty(x.shape[0], dtype=torch.float64),
        torch.empty(4, dtype=torch.float64),
        torch.empty(2, dtype=torch.int64),
    )
    library = compiled.library(NAME, INTERFACE)
    library.normfree_stream_sums(
        ELEMENT_TYPES[x.dtype], address(x), *sizes(*x.shape), *map(address, sums), torch.get_num_threads()
    )
    return sums


def count_nonzero(x: Tensor) -> int | None:
    """How many entries of x, which :func:`kernels_take`, are not zero; None where one is NaN or infinite."""
    x = x.contiguous()
    count = compiled.library(NAME, INTERFACE).normfree_count_nonzero
    count.restype = ctypes.c_int64
    found = int(count(ELEMENT_TYPES[x.dtype], address(x), *sizes(x.numel()), torch.get_num_threads()))
    return None if found < 0 else found
