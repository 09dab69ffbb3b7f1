"""θ of statistical top-k, for rows of which only what lies above it is wanted ("Spark Transformer", Section 3)."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from normfree.spark.topk import upper_quantile


@cache
def feed_forward_quantile(k: int, n_inner: int) -> float:
    """Φ⁻¹(1 − k/n_inner); −∞ for all of them."""
    return float("-inf") if k == n_inner else upper_quantile(k / n_inner)


PAGE = 4096
"""A cache grows by one key a step, and its table by so many entries at a time."""


def attention_quantiles(k: int | float, n_key: int, device: torch.device | None = None) -> Tensor:
    """Φ⁻¹(1 − k/m) for m = 0 .. n_key visible keys, −∞ where all are kept: [n_key + 1] or longer.

    ``k`` as a float is a share of the visible keys. float64, on the CPU; with ``device`` float32 there.
    """
    return _attention_quantiles(k, -(-(n_key + 1) // PAGE) * PAGE, device)


@lru_cache(maxsize=16, typed=True)  # one key is not a share of 1.0
def _attention_quantiles(k: int | float, length: int, device: torch.device | None) -> Tensor:
    n_visible = torch.arange(length, dtype=torch.float64)
    share = torch.full_like(n_visible, k) if isinstance(k, float) else k / n_visible
    quantiles = -torch.special.ndtri(share.clamp_max(1.0))
    return quantiles if device is None else quantiles.float().to(device)
