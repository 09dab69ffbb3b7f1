"""Variance of the residual stream by layer: what grows with depth under Pre-LN (Sun et al., 2025, Section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from normfree.columns import STANDARD_ERROR
from normfree.interpret.depth.averages import mean_and_standard_error
from normfree.interpret.depth.growth import fit_growth

ALL_TOKENS, WITHOUT_FIRST = "all", "without first"
"""The two sets of tokens that variances are averaged over."""


def token_variances(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """The variance of each token over its channels, mean((x − mean(x))²): float64 [n_layer + 1, batch, T]."""
    return torch.stack([x.detach().double().var(dim=-1, correction=0).cpu() for x in streams])


def nonfinite_entries(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """NaN and infinite entries of each of ``streams``: int64 [n_layer + 1]."""
    return torch.stack([(~x.isfinite()).sum().cpu() for x in streams])


def variance_frames(variances: torch.Tensor, nonfinite: torch.Tensor) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames ``residual_variance`` and ``variance_growth`` of a measurement.

    Args:
        variances: of each token, [n_layer + 1, n_sequence, T] (see :func:`token_variances`), T at least 2.
        nonfinite: entries that are NaN or infinite, [n_layer + 1].

    Returns:
        residual_variance: tokens ("all", or "without first": the first token of a sequence can be so large that it
            alone decides the mean), layer (0 to n_layer: the stream at the input of that block; n_layer is the end),
            residual_variance (mean over tokens, then sequences), standard_error (over sequences), fitted_variance (by
            the best law; none at layer 0), nonfinite_entries.
        variance_growth: tokens and the columns of :func:`~normfree.interpret.depth.growth.fit_growth`.
    """
    by_layer, growth = [], []
    for tokens, first in ((ALL_TOKENS, 0), (WITHOUT_FIRST, 1)):
        mean, error = mean_and_standard_error(variances[..., first:].mean(dim=-1))
        fits, fitted = fit_growth(mean[1:])
        columns = {
            "residual_variance": mean,
            STANDARD_ERROR: error,
            "fitted_variance": [float("nan"), *fitted],
            "nonfinite_entries": nonfinite.numpy(),
        }
        by_layer.append(pd.DataFrame({"tokens": tokens, "layer": range(len(mean)), **columns}))
        growth.append(fits.assign(tokens=tokens)[["tokens", *fits.columns]])
    return pd.concat(by_layer, ignore_index=True), pd.concat(growth, ignore_index=True)
