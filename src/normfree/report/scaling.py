"""Where one activation beats another: the gap between their losses over sizes and learning rates."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from normfree.errors import InputError
from normfree.report.frames import in_order
from normfree.report.numbers import number
from normfree.report.style import TWO_COLUMN, difference_colours, mark_non_finite, paper_style, readable_on

OWN_BEST = "own best"
"""The row of a gap table in which each activation has its own best learning rate."""
GAP_COLUMNS = ("size", "activation", "learning_rate", "seed", "eval_loss")


def loss_gap(results: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Loss of ``first`` less loss of ``second`` in nats per token, by learning rate (rows) and size (columns).

    Mean over seeds. The last row, ``own best``, takes each activation at the learning rate where its
    mean loss over seeds is lowest; a rate at which any seed diverged is no candidate. 100 (exp(gap) − 1) is by how many
    percent the perplexity of ``first`` is higher.

    Args:
        results: columns size, activation, learning_rate, seed, eval_loss (NaN: diverged).
        first: the activation whose excess is shown.
        second: the activation it is compared with.

    Returns:
        Rows: learning rates in rising order as text, then ``own best``; columns: sizes in order of appearance. NaN
        where a run diverged or is missing.

    Raises:
        InputError: a column is missing, or a run occurs twice.
    """
    missing = [name for name in GAP_COLUMNS if name not in results.columns]
    if missing:
        raise InputError(f"the results frame lacks {', '.join(missing)}; it needs {', '.join(GAP_COLUMNS)}")
    key = list(GAP_COLUMNS[:-1])
    if results.duplicated(key).any():
        raise InputError("the results frame has a run twice; give one row for each size, activation, rate and seed")
    runs: dict[tuple[str, str, float], list[float]] = {}
    for size, activation, rate, _, loss in results[list(GAP_COLUMNS)].itertuples(index=False):
        runs.setdefault((size, activation, rate), []).append(loss)
    losses = {run: float(np.mean(each)) for run, each in runs.items()}
    rates = sorted(in_order(results["learning_rate"]))
    gap = pd.DataFrame(np.nan, index=[*(f"{rate:g}" for rate in rates), OWN_BEST], columns=in_order(results["size"]))
    for size in in_order(results["size"]):
        ours, theirs = (
            np.array([losses.get((size, activation, rate), np.nan) for rate in rates]) for activation in (first, second)
        )
        gap[size] = [*(ours - theirs), _lowest(ours) - _lowest(theirs)]
    return gap


def _lowest(losses: np.ndarray) -> float:
    return float(np.nanmin(losses)) if np.isfinite(losses).any() else float("nan")


def loss_gap_heatmap(gap: pd.DataFrame, *, first: str, second: str) -> Figure:
    """The gaps of :func:`loss_gap` on a scale centred at zero, written as percent of perplexity.

    Red: ``first`` is worse; blue: ``second`` is. Hatched: a run diverged or is missing.
    """
    values = gap.to_numpy(dtype=np.float64)
    finite = np.abs(values[np.isfinite(values)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    colours = difference_colours()
    with paper_style():
        figure = Figure(
            figsize=(min(TWO_COLUMN, 1.9 + 0.62 * values.shape[1]), 1.0 + 0.3 * len(gap)), layout="constrained"
        )
        axes = figure.subplots()
        shown = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                text = f"{number(100 * np.expm1(value), '+.0f')} %"
                colour = readable_on(colours, (value + limit) / (2 * limit))
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
        mark_non_finite(axes, values)
        axes.axhline(len(gap) - 1.5, color="white", linewidth=2.5)
        axes.set_xticks(range(values.shape[1]), gap.columns, rotation=25, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(gap)), gap.index)
        axes.set_ylabel("learning rate")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(shown, ax=axes, aspect=18, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(f"loss of {first} less that of {second}\n(nats per token)")
    return figure
