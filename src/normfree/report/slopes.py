"""Learnable negative slopes over training (ReLU's Revival, Figure 3)."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from normfree.report.frames import DECAY_ONLY, SLOPES, check_columns, check_frame, check_one_setting, in_order
from normfree.report.style import INK, TWO_COLUMN, depth_bar, depth_colours, hide_unused_panels, paper_style


def negative_slope_trajectories(slopes: pd.DataFrame, *, decay_only: pd.DataFrame, n_columns: int = 4) -> Figure:
    """The learned slope of each layer over training, a panel each configuration.

    Lines go from light (first layer) to dark (last) and are means over seeds; a slope that all layers share is one
    black line. The dashed line is where weight decay alone would have taken the initial slope.

    Args:
        slopes: columns model, context_length, configuration, seed, step, layer, negative_slope.
        decay_only: columns configuration, step, negative_slope: see :func:`slope_under_decay_only`.
        n_columns: panels in a row, filled row by row in the order of ``slopes``.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, or the frame mixes models or context
            lengths.
    """
    check_frame(slopes, "slopes", SLOPES, ("negative_slope",))
    check_one_setting(slopes, "slopes")
    check_columns(decay_only, "decay_only", DECAY_ONLY)  # without weight decay it has no row
    configurations = in_order(slopes["configuration"])
    layers = sorted(in_order(slopes["layer"]))
    colours = depth_colours(len(layers))
    n_rows = ceil(len(configurations) / n_columns)
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 0.35 + 1.35 * n_rows), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        for axes, configuration in zip(grid.flat, configurations, strict=False):
            runs = slopes[slopes["configuration"] == configuration]
            shared = runs["layer"].nunique() == 1
            _draw_slopes(axes, runs, [INK if shared else colours(i) for i in range(len(layers))], layers)
            alone = decay_only[decay_only["configuration"] == configuration]
            axes.plot(alone["step"], alone["negative_slope"], color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
            axes.axhline(0, color=INK, linewidth=0.5)
            axes.set_title(configuration, fontsize=6.5)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        hide_unused_panels(grid, len(configurations))
        n_seeds = slopes["seed"].nunique()
        note = f"mean over {n_seeds} seeds; " if n_seeds > 1 else ""
        figure.supxlabel(f"training step ({note}dashed: weight decay alone)", fontsize=7)
        figure.supylabel("negative slope of leaky ReLU", fontsize=7)
        depth_bar(figure, grid, colours, layers, "layer", aspect=30)
    return figure


def _draw_slopes(axes: Axes, runs: pd.DataFrame, colours: Sequence[Any], layers: Sequence[int]) -> None:
    for layer, colour in zip(layers, colours, strict=True):
        of_layer = runs[runs["layer"] == layer].pivot(index="step", columns="seed", values="negative_slope")
        axes.plot(of_layer.index, of_layer.mean(axis=1, skipna=False), color=colour, linewidth=1.0)


def slope_under_decay_only(initial: float, learning_rates: pd.Series, weight_decay: float) -> pd.Series:
    """Where AdamW's decoupled decay alone takes a slope: initial · Π (1 − η_t λ), indexed by step.

    Args:
        initial: the slope before the first step.
        learning_rates: η by step, from 1, possibly with steps left out; each value stands for the steps since the one
            before it.
        weight_decay: λ (Loshchilov & Hutter 2019, Algorithm 2).
    """
    steps = learning_rates.index.to_numpy()
    elapsed = np.diff(steps, prepend=0)
    factors = (1 - weight_decay * learning_rates.to_numpy(dtype=np.float64)) ** elapsed
    path = initial * np.cumprod(factors)
    return pd.Series([initial, *path], index=[0, *steps], name="negative_slope")
