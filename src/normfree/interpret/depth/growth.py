"""Laws of growth of the residual stream's variance over depth: constant, linear, power law or exponential.

All model log variance with Gaussian errors of one size, log v_l = log f(l) + ε_l, so that their likelihoods are
comparable; a line fitted to v itself would depend on the last layers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from scipy.special import stdtrit

from normfree.interpret.depth.averages import FloatArray

CONSTANT, LINEAR, POWER, EXPONENTIAL = "constant", "linear", "power law", "exponential"
LEVEL = 0.95
DISTINCT = 2.0
"""Difference of AICc below which another law is as good (Burnham & Anderson, "Model Selection", 2002, §2.6)."""

_ROUNDING = 1e-12
"""Relative size of rounding errors, a floor that keeps the likelihood of an exact fit finite."""


@dataclass(frozen=True)
class _Fit:
    """log f over the points; scale a and rate b, each with its interval; ``n_parameter`` of f."""

    log_values: FloatArray
    scale: tuple[float, float, float]
    rate: tuple[float, float, float]
    n_parameter: int


def fit_growth(variance: FloatArray) -> tuple[pd.DataFrame, FloatArray]:
    """Fits ``variance`` [n_layer], after each block, against depth l = 1 ... n_layer.

    ==============  ===============
    constant        f(l) = a
    linear          f(l) = a + b l
    power law       f(l) = a l^b
    exponential     f(l) = a e^(b l)
    ==============  ===============

    The embedding, l = 0, is left out: its variance comes from no layer and can be orders of magnitude smaller.

    Least squares on log variance, closed-form for three laws, iterative for the linear one, whose values at both ends
    are kept positive. Laws are compared by AICc = n ln(RSS / n) + 2 k + 2 k (k + 1) / (n − k − 1), where k counts the
    parameters of f and the size of the errors. 95 % intervals come from Student's t and the curvature of the sum of
    squares (delta method for the linear law); as layers are not independent, they are rather too narrow.

    Returns:
        The laws, best first: law, scale, scale_low, scale_high (a, in units of the variance), rate, rate_low, rate_high
        (b: units of the variance a layer, an exponent, or 1 / layer; NaN for the constant), log_std (of ε), aicc,
        delta_aicc, akaike_weight, is_best, is_distinct (the best law leads by 2 or more). All NaN and False for fewer
        than five layers, or if a variance is not finite and positive. And the best law's values, float64 [n_layer].
    """
    n = len(variance)
    if n < 5 or not (np.isfinite(variance).all() and (variance > 0).all()):
        return _frame(dict.fromkeys(_FITS), n, np.zeros(n)), np.full(n, np.nan)
    observed = np.log(variance)
    fits: dict[str, _Fit | None] = {law: fit(observed) for law, fit in _FITS.items()}
    frame = _frame(fits, n, observed)
    best = fits[frame["law"].iloc[0]]
    assert best is not None, "all were fitted"
    return frame, np.exp(best.log_values)


def _frame(fits: dict[str, _Fit | None], n: int, observed: FloatArray) -> pd.DataFrame:
    rows = []
    for law, fit in fits.items():
        row: dict[str, object] = {"law": law}
        for name, values in (("scale", fit and fit.scale), ("rate", fit and fit.rate)):
            value, low, high = values or (np.nan,) * 3
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        squares, k = np.nan, 0
        if fit is not None:
            floor = n * (_ROUNDING * max(1.0, float(np.abs(observed).max()))) ** 2
            squares, k = max(float(np.square(observed - fit.log_values).sum()), floor), fit.n_parameter + 1
        row["log_std"] = float(np.sqrt(squares / (n - k + 1))) if fit else np.nan
        row["aicc"] = n * np.log(squares / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1) if fit else np.nan
        rows.append(row)
    frame = pd.DataFrame(rows).sort_values("aicc", kind="stable", ignore_index=True)
    frame["delta_aicc"] = frame["aicc"] - frame["aicc"].min()
    likelihood = np.exp(-frame["delta_aicc"] / 2)
    frame["akaike_weight"] = likelihood / likelihood.sum()
    is_fitted = bool(frame["aicc"].notna().all())
    frame["is_best"] = [is_fitted and i == 0 for i in range(len(frame))]
    frame["is_distinct"] = frame["is_best"] & bool(frame["delta_aicc"].iloc[1] >= DISTINCT)
    return frame


def _constant(observed: FloatArray) -> _Fit:
    columns = np.ones((len(observed), 1))
    (level,), intervals = _least_squares(columns, observed)
    scale = tuple(float(np.exp(value)) for value in (level, *intervals[0]))
    return _Fit(np.full(len(observed), level), (scale[0], scale[1], scale[2]), (np.nan,) * 3, 1)


def _straight(abscissa: Callable[[FloatArray], FloatArray]) -> Callable[[FloatArray], _Fit]:
    """A law whose logarithm is a straight line over ``abscissa`` of the depth."""

    def fit(observed: FloatArray) -> _Fit:
        x = abscissa(np.arange(1, len(observed) + 1, dtype=np.float64))
        columns = np.stack([np.ones_like(x), x], axis=1)
        (level, slope), (of_level, of_slope) = _least_squares(columns, observed)
        low, high = np.exp(of_level)
        return _Fit(
            columns @ [level, slope],
            (float(np.exp(level)), float(low), float(high)),
            (float(slope), float(of_slope[0]), float(of_slope[1])),
            2,
        )

    return fit


def _linear(observed: FloatArray) -> _Fit:
    """f(l) = (1 − s) e^u + s e^w with s = (l − 1) / (n_layer − 1): a line between two positive values."""
    n = len(observed)
    s = np.arange(n) / (n - 1)
    # Relative to the mean, which keeps exponentials in range.
    centre = observed.mean()

    def log_values(ends: FloatArray) -> FloatArray:
        u, w = ends
        return np.logaddexp(np.log1p(-s[:-1]) + u, np.log(s[:-1], out=np.full(n - 1, -np.inf), where=s[:-1] > 0) + w)

    def residuals(ends: FloatArray) -> FloatArray:
        return np.append(log_values(ends), ends[1]) - (observed - centre)

    def jacobian(ends: FloatArray) -> FloatArray:
        at = np.append(log_values(ends), ends[1])
        of_w = s * np.exp(ends[1] - at)
        return np.stack([1 - of_w, of_w], axis=1)

    start = observed[[0, -1]] - centre
    found = least_squares(residuals, start, jacobian, method="lm", xtol=1e-14, ftol=1e-14, gtol=1e-14)
    covariance, quantile = _covariance(jacobian(found.x), residuals(found.x))
    u, w = found.x + centre
    # b = (e^w − e^u) / (n − 1) and a = e^u − b, with their gradients in u and w
    rate_gradient = np.array([-np.exp(u), np.exp(w)]) / (n - 1)
    rate = float(rate_gradient.sum())
    scale_gradient = np.array([np.exp(u), 0.0]) - rate_gradient
    scale = float(scale_gradient.sum())
    of_scale, of_rate = (
        quantile * float(np.sqrt(gradient @ covariance @ gradient)) for gradient in (scale_gradient, rate_gradient)
    )
    return _Fit(
        residuals(found.x) + observed,
        (scale, scale - of_scale, scale + of_scale),
        (rate, rate - of_rate, rate + of_rate),
        2,
    )


def _least_squares(columns: FloatArray, observed: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The coefficients [k] and their intervals [k, 2]."""
    coefficients = np.linalg.lstsq(columns, observed, rcond=None)[0].astype(np.float64)
    covariance, quantile = _covariance(columns, observed - columns @ coefficients)
    half = quantile * np.sqrt(np.diag(covariance))
    return coefficients, np.stack([coefficients - half, coefficients + half], axis=1)


def _covariance(jacobian: FloatArray, residuals: FloatArray) -> tuple[FloatArray, float]:
    """Of the parameters [k, k], and the t quantile of their intervals."""
    n, k = jacobian.shape
    variance = float(residuals @ residuals) / (n - k)
    return variance * np.linalg.pinv(jacobian.T @ jacobian), float(stdtrit(n - k, 0.5 + LEVEL / 2))


_FITS: dict[str, Callable[[FloatArray], _Fit]] = {
    CONSTANT: _constant,
    LINEAR: _linear,
    POWER: _straight(np.log),
    EXPONENTIAL: _straight(lambda depth: depth),
}
