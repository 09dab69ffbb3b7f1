"""How numbers are written: with their interval, a true minus sign, and NaN by its name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from normfree.report.intervals import Estimate, mean_confidence_interval


def number(value: float, form: str) -> str:
    """``value`` by the format specification ``form``, as in ``20.6 %``; one of exactly zero is unsigned."""
    if np.isnan(value):
        return "NaN"
    written = format(value, form.removeprefix("+") if value == 0 else form)
    return written.replace("-", "\N{MINUS SIGN}").replace("%", " %")


def counted(n: int, noun: str) -> str:
    """``1 thread``, ``2 threads``, ``1,000 steps``."""
    return f"{n:,} {noun}" + "s" * (n != 1)


def plus_minus(estimate: Estimate, form: str) -> str:
    """``3.080 ± 0.004``: the mean and half of its interval; the mean alone where there is none, or no doubt about 0."""
    half = (estimate.high - estimate.low) / 2
    shown = number(estimate.mean, form)
    is_alone = np.isnan(estimate.mean) or np.isnan(half) or half == estimate.mean == 0
    return shown if is_alone else f"{shown} ± {format(half, form.removeprefix('+'))}"


def mean_and_half(values: pd.Series, *, signed: bool = False, digits: int = 2) -> str:
    """:func:`plus_minus` of the 95 % t-interval of ``values``; NaN where one value is NaN.

    ``digits`` after the point are those of a mean below 100; larger ones have fewer.
    """
    estimate = mean_confidence_interval(values.to_numpy(dtype=np.float64))
    size = abs(estimate.mean)
    form = ",.0f" if size >= 1000 else ".1f" if size >= 100 else f".{digits}f"
    return plus_minus(estimate, f"+{form}" if signed else form)


def over_seeds(runs: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """A row a configuration: Configuration, Seeds, and :func:`mean_and_half` of the ``columns``, by their headings."""
    rows = []
    for configuration, chosen in runs.groupby("configuration", sort=False):
        cells = {heading: mean_and_half(chosen[column]) for heading, column in columns.items()}
        rows.append({"Configuration": configuration, "Seeds": len(chosen), **cells})
    return pd.DataFrame(rows)
