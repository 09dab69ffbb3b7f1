"""The compiled CPU kernels of attention entropy (csrc/attention_entropy.cpp): one pass over the scores, float32."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from normfree import compiled
from normfree.compiled import address, size_array, sizes
from normfree.entropy.scoring import Scoring
from normfree.entropy.visibility import Visibility

NAME, INTERFACE = "attention_entropy", 3
NO_DISTRIBUTION, NOT_POSITIVE = 1, 2
"""Flags that the kernel of weights returns."""


def kernels_refuse() -> str | None:
    """Why the compiled kernels cannot be used on this machine; None if they can."""
    return compiled.library_refuses(NAME, INTERFACE)


def are_fast() -> bool:
    """True if they are compiled for this CPU's wide vectors; otherwise torch's flash kernel is as fast."""
    return torch.backends.cpu.get_cpu_capability() in compiled.LIBRARIES and kernels_refuse() is None


def entropy_and_lse(q: Tensor, k: Tensor, scoring: Scoring, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Entropy in nats and logsumexp of every query: both float32 [batch, n_head, n_query].

    q [batch, n_head, n_query, head_dim], k [batch, n_kv_head, n_key, head_dim]: float32 on the CPU. A query that sees
    no key has NaN and -inf; one that sees a non-finite score NaN and NaN.
    """
    q, k = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k))
    batch, n_head, n_query, head_dim = q.shape
    n_kv_head, n_key = k.shape[1:3]
    allowed, allowed_strides = _by_rows(visibility.allowed)
    bias, bias_strides = _by_rows(None if visibility.bias is None else visibility.bias.float())
    entropy, lse = torch.empty(2, batch, n_head, n_query)
    shape = (batch, n_head, n_head // n_kv_head, n_query, n_key, head_dim, *q.stride()[:3], *k.stride()[:3])
    first, last = visibility.first.contiguous(), visibility.last.contiguous()
    compiled.library(NAME, INTERFACE).normfree_attention_entropy(
        *map(address, (q, k)),
        size_array(*shape),
        *map(address, (first, last, allowed)),
        size_array(*allowed_strides),
        ctypes.c_float(scoring.scale),
        ctypes.c_float(scoring.softcap or 0.0),
        address(bias),
        size_array(*bias_strides),
        *map(address, (entropy, lse)),
        torch.get_num_threads(),
    )
    return entropy, lse


def _by_rows(mask: Tensor | None) -> tuple[Tensor | None, list[int]]:
    """A mask with contiguous keys, and its strides of sequence, head and query: 0 for a size of 1."""
    if mask is None:
        return None, [0, 0, 0]
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask, [0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True)]


class WeightSums(NamedTuple):
    """What rows of weights say.

    entropy: of each row, nats, float32 [batch, n_head, n_query]; NaN for a row with a NaN.
    first: first entry of each row, likewise.
    are_distributions: no row's sum differs from 1 by more than allowed; sums that are NaN pass.
    all_positive: no entry is 0 or NaN.
    """

    entropy: Tensor
    first: Tensor
    are_distributions: bool
    all_positive: bool


def weights_entropy(weights: Tensor, visibility: Visibility, *, max_total_error: float) -> WeightSums:
    """Entropy of materialised attention weights.

    weights: float32 [batch, n_head, n_query, n_key] on the CPU; entries after the last key that causality and window
        leave are not read.
    """
    weights, lengths = weights.contiguous(), visibility.last.contiguous()
    entropy, first = torch.empty(2, *weights.shape[:3])
    found = compiled.library(NAME, INTERFACE).normfree_weights_entropy(
        address(weights),
        *sizes(entropy.numel(), weights.shape[3]),
        address(lengths),
        *sizes(visibility.n_query),
        ctypes.c_float(max_total_error),
        *map(address, (entropy, first)),
        torch.get_num_threads(),
    )
    return WeightSums(entropy, first, not found & NO_DISTRIBUTION, not found & NOT_POSITIVE)


class QuerySums(NamedTuple):
    """The contiguous sums that :func:`add_queries` adds to.

    rows int64 [T]; bound and entropy float64 [n_head, T]; sink float64 [n_head].
    """

    rows: Tensor
    bound: Tensor
    entropy: Tensor
    sink: Tensor


def add_queries(
    sums: QuerySums, start: int, entropy: Tensor, share: Tensor | None, rows: Tensor, bound: Tensor
) -> bool:
    """Adds the queries of a batch, at positions ``start`` and up, to the sums of a layer, on the CPU.

    entropy, and share unless None: float32 [batch, n_head, n_query]. rows int64 [n_query] and bound float64 [n_head or
    1, n_query] are sums over the batch.

    Returns:
        False if an entropy or a share is NaN; then nothing is added.
    """
    entropy, bound = entropy.contiguous(), bound.contiguous()
    share = None if share is None else share.contiguous()
    batch, n_head, n_query = entropy.shape
    has_nan = compiled.library(NAME, INTERFACE).normfree_add_queries(
        *sizes(batch, n_head, n_query),
        *map(address, (entropy, share, rows, bound)),
        *sizes(0 if bound.shape[0] == 1 else n_query, sums.rows.shape[0]),
        *(address(each, start) for each in (sums.rows, sums.bound, sums.entropy)),
        address(sums.sink),
    )
    return not has_nan
