"""Means over sequences, or over probes, with their standard errors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def mean_and_standard_error(values: torch.Tensor) -> tuple[FloatArray, FloatArray]:
    """Over the last dimension of ``values`` [..., n]: the mean and s / sqrt(n), float64 [...].

    s has n − 1 degrees of freedom; for one value the error is NaN. Both are not finite if a value is not.
    """
    sample = values.double().cpu().numpy()
    n = sample.shape[-1]
    with np.errstate(invalid="ignore", over="ignore"):
        if n == 1:
            return sample[..., 0], np.full(sample.shape[:-1], np.nan)
        return sample.mean(axis=-1), sample.std(axis=-1, ddof=1) / np.sqrt(n)
