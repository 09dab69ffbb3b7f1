"""Variance of the residual stream by layer, which grows with depth under Pre-LN (Sun et al., 2025, Section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from normfree.columns import STANDARD_ERROR
from normfree.interpret.depth.averages import mean_and_standard_error
from normfree.interpret.depth.growth import fit_growth

ALL_TOKENS, WITHOUT_FIRST = "all", "without first"
"""The two sets of tokens that variances are averaged over."""


def residual_variances(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Variance over channels, mean((x − mean(x))²), as the mean over all tokens and over all but the first.

    Returns:
        float64 [2, n_layer + 1, batch].
    """
    variances = torch.stack([x.detach().double().var(dim=-1, correction=0).cpu() for x in streams])
    return torch.stack([variances.mean(dim=-1), variances[..., 1:].mean(dim=-1)])


def nonfinite_entries(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Number of NaN and infinite entries: int64 [n_layer + 1, batch]."""
    return torch.stack([(~x.isfinite()).sum(dim=(1, 2)).cpu() for x in streams])


def variance_frames(variances: torch.Tensor, nonfinite: torch.Tensor) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames ``residual_variance`` and ``variance_growth`` of a measurement.

    Args:
        variances: :func:`residual_variances` of all sequences, [2, n_layer + 1, n_sequence].
        nonfinite: :func:`nonfinite_entries` of all sequences, [n_layer + 1, n_sequence].

    Returns:
        residual_variance: tokens ("all", or "without first": a sequence's first token can dominate the mean), layer (0
            to n_layer: the stream at the input of that block; n_layer is the end), residual_variance (mean over tokens,
            then sequences), standard_error (over sequences), fitted_variance (by the best law; none at layer 0),
            nonfinite_entries.
        variance_growth: tokens and the columns of :func:`~normfree.interpret.depth.growth.fit_growth`.
    """
    by_layer, growth = [], []
    for tokens, of_tokens in zip((ALL_TOKENS, WITHOUT_FIRST), variances, strict=True):
        mean, error = mean_and_standard_error(of_tokens)
        fits, fitted = fit_growth(mean[1:])
        columns = {
            "tokens": tokens,
            "layer": range(len(mean)),
            "residual_variance": mean,
            STANDARD_ERROR: error,
            "fitted_variance": [np.nan, *fitted],
            "nonfinite_entries": nonfinite.sum(dim=1).numpy(),
        }
        by_layer.append(pd.DataFrame(columns))
        growth.append(fits.assign(tokens=tokens)[["tokens", *fits.columns]])
    return pd.concat(by_layer, ignore_index=True), pd.concat(growth, ignore_index=True)
