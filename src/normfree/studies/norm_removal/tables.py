"""The cost of removing norms: losses with and without them, and the tokens it takes by model size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from normfree.columns import EVAL_LOSS
from normfree.errors import InputError
from normfree.removal.layout import NORM_FREE, ORIGINAL, VANILLA
from normfree.report.frames import check_frame, in_order
from normfree.report.intervals import Estimate, mean_confidence_interval
from normfree.report.numbers import number, plus_minus

REMOVALS = ("configuration", "share", "learning_rate", "seed", "variant", "finetuning_tokens", EVAL_LOSS)
VARIANTS = (ORIGINAL, VANILLA, NORM_FREE)
_BUDGET = ["configuration", "share"]


def at_best_rates(removals: pd.DataFrame) -> pd.DataFrame:
    """The rows of each variant at the learning rate where its mean evaluation loss over seeds is lowest.

    A variant's rate is chosen for each configuration and budget apart, on the evaluation loss that is reported. A rate
    at which a seed is missing or diverged (NaN) is no candidate; where none is left, ``eval_loss`` and
    ``learning_rate`` are NaN. The original was not fine-tuned: its ``learning_rate`` is NaN.

    Args:
        removals: columns configuration, share (of the tokens that the original was trained on), learning_rate, seed,
            variant (original, vanilla, norm-free), finetuning_tokens, eval_loss (nats).

    Returns:
        The same columns, a row a configuration, share, variant and seed.

    Raises:
        InputError: a column is missing, or a run occurs twice.
    """
    check_frame(removals, "removals", REMOVALS, ("finetuning_tokens", EVAL_LOSS))
    kept = []
    for _, budget in removals.groupby(_BUDGET, sort=False):
        n_seed = budget["seed"].nunique()
        for variant in in_order(budget["variant"]):
            rows = budget[budget["variant"] == variant]
            if variant == ORIGINAL:
                kept.append(rows.drop_duplicates("seed").assign(learning_rate=np.nan))
                continue
            means = {
                rate: float(each[EVAL_LOSS].mean(skipna=False))
                for rate, each in rows.groupby("learning_rate")
                if len(each) == n_seed
            }
            finite = {rate: mean for rate, mean in means.items() if np.isfinite(mean)}
            if finite:
                kept.append(rows[rows["learning_rate"] == min(finite, key=finite.__getitem__)])
            else:
                kept.append(rows.drop_duplicates("seed").assign(learning_rate=np.nan, eval_loss=np.nan))
    return pd.concat(kept, ignore_index=True)[list(REMOVALS)]


def removal_table(removals: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration and budget: losses in nats, and how far apart they are, each variant at its best rate.

    Args:
        removals: see :func:`at_best_rates`.

    Returns:
        Columns configuration, share, finetuning_tokens, seeds; original, vanilla, norm-free: means over seeds;
        to_vanilla, to_original: what the norm-free loss is higher by, the mean of the differences of the same seed;
        each of these with ``_low`` and ``_high``, its 95 % t-interval over seeds; vanilla_learning_rate,
        norm-free_learning_rate. A variant that was not trained, or diverged, is NaN.
    """
    rows = []
    for (configuration, share), budget in at_best_rates(removals).groupby(_BUDGET, sort=False):
        losses = budget.pivot(index="seed", columns="variant", values=EVAL_LOSS).reindex(columns=list(VARIANTS))
        rates = budget.groupby("variant")["learning_rate"].first()
        row: dict[str, Any] = {
            "configuration": configuration,
            "share": share,
            "finetuning_tokens": int(budget["finetuning_tokens"].max()),
            "seeds": len(losses),
        }
        values = {variant: losses[variant] for variant in VARIANTS}
        values |= {
            "to_vanilla": losses[NORM_FREE] - losses[VANILLA],
            "to_original": losses[NORM_FREE] - losses[ORIGINAL],
        }
        for name, column in values.items():
            found = mean_confidence_interval(column.to_numpy(dtype=np.float64))
            row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row | {f"{each}_learning_rate": rates.get(each, np.nan) for each in (VANILLA, NORM_FREE)})
    return pd.DataFrame(rows)


def formatted_removals(table: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`removal_table` for readers: ``mean ± half`` of the interval."""
    losses = {"Original": ORIGINAL, "Vanilla": VANILLA, "Norm-free": NORM_FREE}
    differences = {"To vanilla": "to_vanilla", "To original": "to_original"}
    return pd.DataFrame(
        {
            "Configuration": row["configuration"],
            "Budget": f"{100 * row['share']:g} %",
            "Tokens": f"{row['finetuning_tokens']:,}",
            "Seeds": str(row["seeds"]),
            **{heading: plus_minus(estimate(row, name), ".4f") for heading, name in losses.items()},
            **{heading: plus_minus(estimate(row, name), "+.4f") for heading, name in differences.items()},
            "Rates": f"{row['vanilla_learning_rate']:g}, {row['norm-free_learning_rate']:g}",
        }
        for row in table.to_dict("records")
    )


def estimate(row: Mapping[Any, Any], name: str) -> Estimate:
    """The mean ``name`` in a row of :func:`removal_table`, with its interval."""
    return Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"], row["seeds"])


def published_removals(published: pd.DataFrame) -> pd.DataFrame:
    """The published losses on OpenWebText, in the columns of :func:`formatted_removals`.

    Args:
        published: ``load_published("ln_removal_gpt2_cross_entropy")``.
    """
    names = {"original": "Original", "vanilla finetuned": "Vanilla", "LN-free": "Norm-free"}
    losses = published.pivot(index="model", columns="variant", values="openwebtext_val").rename(columns=names)
    steps = published.groupby("model", sort=False)["finetune_steps"].max()
    losses = losses.loc[steps.index, list(names.values())]
    columns: dict[str, list[str]] = {"Model": [str(name) for name in losses.index], "Steps": steps.map(str).tolist()}
    columns |= {name: [f"{value:.4f}" for value in losses[name]] for name in names.values()}
    for title, reference in (("To vanilla", "Vanilla"), ("To original", "Original")):
        columns[title] = [number(value, "+.4f") for value in losses["Norm-free"] - losses[reference]]
    return pd.DataFrame(columns)


@dataclass(frozen=True, slots=True)
class Reached:
    """The tokens after which a loss is low enough.

    bound: ``interpolated`` between two budgets; ``at most``: the smallest budget is enough, or the one below it
    diverged; ``more than``: the largest is not.
    """

    tokens: float
    bound: Literal["interpolated", "at most", "more than"]


def tokens_to_reach(tokens: Sequence[float], excess: Sequence[float], threshold: float) -> Reached:
    """When ``excess`` first is at most ``threshold``, linear in the logarithm of ``tokens`` between two budgets.

    Each budget is a run with a schedule of its own. NaN (diverged) is no success.

    Raises:
        InputError: there is no budget, one is not positive or occurs twice, or the two differ in number.
    """
    if not len(tokens) == len(excess) > 0 or len(set(tokens)) < len(tokens) or min(tokens) <= 0:
        raise InputError(f"need different positive budgets and a loss for each, got {list(tokens)} and {list(excess)}")
    budgets, losses = (list(each) for each in zip(*sorted(zip(tokens, excess, strict=True)), strict=True))
    first = next((place for place, loss in enumerate(losses) if loss <= threshold), None)
    if first is None:
        return Reached(float(budgets[-1]), "more than")
    if first == 0 or not np.isfinite(losses[first - 1]):
        return Reached(float(budgets[first]), "at most")
    (low, high), (above, below) = np.log(budgets[first - 1 : first + 1]), losses[first - 1 : first + 1]
    return Reached(float(np.exp(low + (high - low) * (above - threshold) / (above - below))), "interpolated")


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """y = ``factor`` · x^``exponent``, with the exponent's confidence interval over ``n`` points."""

    exponent: float
    low: float
    high: float
    factor: float
    n: int


def power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares of log y on log x, with a 95 % Student t-interval of the slope (n - 2 degrees of freedom).

    With two points the bounds are NaN; with fewer than two different x, so is everything.

    Raises:
        InputError: the two differ in number, or a value is not positive and finite.
    """
    xs, ys = (np.asarray(each, dtype=np.float64) for each in (x, y))
    if xs.shape != ys.shape or not all((np.isfinite(each) & (each > 0)).all() for each in (xs, ys)):
        raise InputError("a power law needs as many x as y, all positive and finite")
    n, nan = len(xs), float("nan")
    if len(set(xs.tolist())) < 2:
        return PowerLaw(nan, nan, nan, nan, n)
    # scipy's linregress has the standard error from 1 − r², which loses its digits in a close fit.
    centred, logs = np.log(xs) - np.log(xs).mean(), np.log(ys)
    spread = float(centred @ centred)
    slope = float(centred @ logs) / spread
    residual = logs - logs.mean() - slope * centred
    half = float(stdtrit(n - 2, 0.975) * np.sqrt(residual @ residual / (n - 2) / spread)) if n > 2 else nan
    factor = float(np.exp(logs.mean() - slope * np.log(xs).mean()))
    return PowerLaw(slope, slope - half, slope + half, factor, n)
