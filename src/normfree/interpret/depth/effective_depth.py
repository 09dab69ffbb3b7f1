"""Effective depth: how many layers a model uses, from the loss increase when each is skipped.

The definition is Normfree's. Csordás et al. ("Do Language Models Use Their Depth Efficiently?", 2025) and Hu et al.
("What Affects the Effective Depth of Large Language Models?", 2025) locate it where curves change along the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from normfree.interpret.depth.averages import FloatArray

USEFUL_SHARE = 0.01
"""Least share of the largest increase for a layer to count as useful."""


@dataclass(frozen=True)
class EffectiveDepth:
    """The result of :func:`effective_depth`.

    effective_depth: the participation ratio, in layers, from 1 (one layer carries all) to n_layer (all carry the same).
    standard_error: over sequences (delete-one jackknife); NaN for a single sequence.
    useful_layers: layers whose increase is at least 1 % of the largest.
    deep_half_share: share of all increases that the deeper half, the last n_layer // 2 layers, carries.
    deep_layer_nats: mean increase over the layers of the deeper half, nats, negative ones included.
    """

    effective_depth: float
    standard_error: float
    useful_layers: float
    deep_half_share: float
    deep_layer_nats: float


def effective_depth(loss_increases: FloatArray) -> EffectiveDepth:
    """The participation ratio (Σ_l d_l)² / Σ_l d_l² of the increases d of the loss when each layer alone is skipped.

    d_l is the mean over sequences; negative means count as 0. The ratio is the inverse Simpson index of the shares
    d_l / Σ d, the number of equal shares of the same concentration (Hill, "Diversity and Evenness", 1973, N₂). It is 0
    if no layer costs anything; all is NaN if an increase is not finite. A single layer has no deeper half.

    Args:
        loss_increases: by layer and sequence, nats, [n_layer, n_sequence].
    """
    if not np.isfinite(loss_increases).all():
        return EffectiveDepth(*[np.nan] * 5)
    n_layer, n = loss_increases.shape
    error = np.nan
    if n > 1:
        without_one = (loss_increases.sum(axis=1, keepdims=True) - loss_increases) / (n - 1)
        replicates = np.array([_participation_ratio(each) for each in without_one.T])
        error = float(np.sqrt((n - 1) * replicates.var()))
    signed, deep = loss_increases.mean(axis=1), slice(n_layer - n_layer // 2, None)
    increases = np.clip(signed, 0, None)
    largest, total = float(increases.max()), float(increases.sum())
    return EffectiveDepth(
        _participation_ratio(increases),
        error,
        float((increases >= USEFUL_SHARE * largest).sum()) if largest else 0.0,
        float(increases[deep].sum()) / total if total else np.nan,
        float(signed[deep].mean()) if n_layer > 1 else np.nan,
    )


def _participation_ratio(increases: FloatArray) -> float:
    clipped = np.clip(increases, 0, None)
    largest = clipped.max()
    if largest == 0:
        return 0.0
    relative = clipped / largest  # squares of any finite increase stay in range
    return float(relative.sum() ** 2 / np.square(relative).sum())
