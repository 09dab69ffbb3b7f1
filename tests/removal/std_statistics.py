"""The statistics of stds that a schedule can name, by NumPy."""

from __future__ import annotations

import numpy as np


def statistic_of(stds: np.ndarray, statistic: str | float) -> float:
    """``mean``, ``median`` or a quantile of ``stds``."""
    if statistic == "mean":
        return float(np.mean(stds))
    return float(np.quantile(stds, 0.5 if statistic == "median" else float(statistic)))
