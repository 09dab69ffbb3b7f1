"""Top-k in float64 NumPy and SciPy, written from the equations and from no code under test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Array = NDArray[np.float64]


def statistical_threshold(x: Array, p: float) -> Array:
    """mean + std · Φ⁻¹(1 − p) over the last dim, kept."""
    return x.mean(-1, keepdims=True) + x.std(-1, keepdims=True) * norm.ppf(1 - p)


def exact_threshold(x: Array, k: int) -> Array:
    """The (k + 1)-th largest entry of the last dim, kept."""
    return np.sort(x, axis=-1)[..., ::-1][..., k : k + 1]


def soft_threshold(x: Array, threshold: Array) -> Array:
    return np.maximum(x - threshold, 0)


def kept(row: Array, k: int, method: str) -> NDArray[np.bool_]:
    """Which entries of one row of visible scores top-k attends to."""
    if len(row) <= k:
        return np.ones(len(row), dtype=bool)
    threshold = statistical_threshold(row, k / len(row)) if method == "statistical" else exact_threshold(row, k)
    return (row > threshold) | (row == row.max())
