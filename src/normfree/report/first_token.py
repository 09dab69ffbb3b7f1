"""Figures of what the first token of a sequence is to a model: its size in the residual stream, and attention to it."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from normfree.errors import InputError
from normfree.report.frames import check_frame, in_order
from normfree.report.signal_propagation import logarithmic_axis
from normfree.report.style import INK, QUIET, TWO_COLUMN, paper_style

RESIDUAL_STDS = ("model", "layer", "first", "others_median", "others_min", "others_max")
SINKS = ("model", "layer", "head", "sink_share")

_FIRST, _OTHERS = "#D55E00", "#0072B2"


def first_token_over_depth(stds: pd.DataFrame, sinks: pd.DataFrame) -> Figure:
    """A column a model: above, the residual stream's std by layer, of the first token and of all others; below, sinks.

    Of the others the line is the median over positions, and the band their range. Below, each dot is the share of its
    attention that a head pays to the first token, and the line their mean.

    Args:
        stds: model, layer, first (std of the first token), others_median, others_min, others_max (over positions).
        sinks: model, layer, head, sink_share; of the same models.

    Raises:
        InputError: a column is missing, a layer or a head occurs twice, or a model has no sinks.
    """
    check_frame(stds, "residual stds", RESIDUAL_STDS, RESIDUAL_STDS[2:])
    check_frame(sinks, "sinks", SINKS, ("sink_share",))
    models = in_order(stds["model"])
    missing = [model for model in models if model not in set(sinks["model"])]
    if missing:
        raise InputError(f"the sinks frame has no rows of the model {missing[0]!r}; give those of every model")
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 3.5), layout="constrained")
        grid = figure.subplots(2, len(models), sharex="col", sharey="row", squeeze=False)
        for column, model in enumerate(models):
            _draw_stds(grid[0, column], stds[stds["model"] == model])
            _draw_sinks(grid[1, column], sinks[sinks["model"] == model])
            grid[0, column].set_title(model)
            grid[1, column].xaxis.set_major_locator(MaxNLocator(8, integer=True))
        logarithmic_axis(grid[0, 0])
        grid[0, 0].set_ylabel("std of the residual stream")
        grid[1, 0].set_ylim(-0.03, 1.03)
        grid[1, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        grid[1, 0].set_ylabel("attention to the first token")
        figure.supxlabel("layer (above: after its block)", fontsize=7)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        of_heads, names = grid[1, 0].get_legend_handles_labels()
        figure.legend(handles + of_heads, labels + names, loc="outside upper center", ncols=4, handlelength=1.6)
    return figure


def _draw_stds(axes: Axes, rows: pd.DataFrame) -> None:
    values = rows.set_index("layer")[list(RESIDUAL_STDS[2:])]
    finite = values.where(np.isfinite(values))
    low, high = finite["others_min"], finite["others_max"]
    axes.fill_between(finite.index, low, high, color=_OTHERS, alpha=0.2, linewidth=0)
    axes.plot(finite.index, finite["others_median"], color=_OTHERS, label="all other tokens: median, range")
    axes.plot(finite.index, finite["first"], color=_FIRST, label="first token")


def _draw_sinks(axes: Axes, rows: pd.DataFrame) -> None:
    shares = rows.assign(sink_share=rows["sink_share"].where(np.isfinite(rows["sink_share"])))
    axes.plot(shares["layer"], shares["sink_share"], "o", markersize=1.8, color=QUIET, label="a head", linewidth=0)
    mean = shares.groupby("layer")["sink_share"].mean()
    axes.plot(mean.index, mean, color=INK, linewidth=1.0, label="mean over heads")
