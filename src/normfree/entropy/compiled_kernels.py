"""Attention entropy by the compiled CPU kernels (csrc/attention_entropy.cpp): one pass over the scores, float32."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from normfree import compiled
from normfree.compiled import address, size_array, sizes
from normfree.entropy.visibility import Visibility

NAME, INTERFACE = "attention_entropy", 1


def kernels_refuse() -> str | None:
    """Why the compiled kernels cannot be used on this machine; None if they can."""
    return compiled.library_refuses(NAME, INTERFACE)


def are_fast() -> bool:
    """Whether they can be used here and were compiled for this CPU's wide vectors.

    Without these torch's flash kernel, which calls a tuned matrix product, is as fast or faster.
    """
    return torch.backends.cpu.get_cpu_capability() in compiled.LIBRARIES and kernels_refuse() is None


def entropy_and_lse(q: Tensor, k: Tensor, scale: float, visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Entropy in nats and logsumexp of every query: both float32 [batch, n_head, n_query].

    q [batch, n_head, n_query, head_dim] and k [batch, n_kv_head, n_key, head_dim]: float32, on the CPU. A query that
    sees no key has NaN and -inf, one that sees a score that is not finite NaN and NaN.
    """
    q, k = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, k))
    batch, n_head, n_query, head_dim = q.shape
    n_kv_head, n_key = k.shape[1:3]
    allowed, strides = visibility.allowed, [0, 0, 0]
    if allowed is not None:
        allowed = allowed if allowed.stride(-1) == 1 else allowed.contiguous()
        # a mask may be one for all sequences, heads or queries
        strides = [
            0 if size == 1 else stride for size, stride in zip(allowed.shape[:3], allowed.stride()[:3], strict=True)
        ]
    entropy, lse = torch.empty(2, batch, n_head, n_query)
    shape = (batch, n_head, n_head // n_kv_head, n_query, n_key, head_dim, *q.stride()[:3], *k.stride()[:3])
    first, last = visibility.first.contiguous(), visibility.last.contiguous()
    compiled.library(NAME, INTERFACE).normfree_attention_entropy(
        *map(address, (q, k)),
        size_array(*shape),
        *map(address, (first, last, allowed)),
        size_array(*strides),
        ctypes.c_float(scale),
        *map(address, (entropy, lse)),
        torch.get_num_threads(),
    )
    return entropy, lse


class WeightSums(NamedTuple):
    """Of each row of weights, float32 [batch, n_head, n_query]: entropy in nats, sum, smallest and first entry.

    A row with a NaN has NaN for its entropy and its sum.
    """

    entropy: Tensor
    totals: Tensor
    smallest: Tensor
    first: Tensor


def weights_entropy(weights: Tensor, visibility: Visibility) -> WeightSums:
    """Sums over attention weights that are there.

    weights: float32 [batch, n_head, n_query, n_key], on the CPU, 0 behind the last key that causality and window leave:
    what is there is not looked at.
    """
    weights, lengths = weights.contiguous(), visibility.last.contiguous()
    sums = WeightSums(*torch.empty(4, *weights.shape[:3]))
    compiled.library(NAME, INTERFACE).normfree_weights_entropy(
        address(weights),
        *sizes(sums.entropy.numel(), weights.shape[3]),
        address(lengths),
        *sizes(visibility.n_query),
        *map(address, sums),
        torch.get_num_threads(),
    )
    return sums
