"""What each head's learned entropy threshold and its entropy do over training (AERO, Jha & Reagen 2024)."""

from math import ceil

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from normfree.errors import InputError
from normfree.report.frames import THRESHOLDS, check_frame, check_one_setting, in_order
from normfree.report.style import INK, TWO_COLUMN, depth_bar, depth_colours, hide_unused_panels, paper_style

_MAX_COLUMNS = 6


def entropy_threshold_trajectories(heads: pd.DataFrame, *, bound: float) -> Figure:
    """Attention entropy (solid) and learned threshold (dashed) of every head over training, a panel each layer.

    A head has one colour for both lines, which are means over seeds. Where one of the seeds is NaN there is no line.

    Args:
        heads: columns model, context_length, configuration, seed, step, layer, head, entropy_nats,
            entropy_threshold_nats, of one configuration; entropy may be missing at the last step, as NaN.
        bound: the uniform bound in nats, drawn as a thin line.

    Raises:
        InputError: a column is missing, a head occurs twice at a step, or the frame mixes configurations, models or
            context lengths.
    """
    check_frame(heads, "heads", THRESHOLDS, ("entropy_nats", "entropy_threshold_nats"))
    check_one_setting(heads, "heads")
    if heads["configuration"].nunique() > 1:
        raise InputError("the heads frame has several configurations; select one, since a panel shows a layer")
    layers = sorted(in_order(heads["layer"]))
    numbers = sorted(in_order(heads["head"]))
    colours = depth_colours(len(numbers))
    n_columns = min(len(layers), _MAX_COLUMNS)
    n_rows = ceil(len(layers) / n_columns)
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 0.55 + 1.3 * n_rows), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        for axes, layer in zip(grid.flat, layers, strict=False):
            of_layer = heads[heads["layer"] == layer]
            for place, head in enumerate(numbers):
                of_head = of_layer[of_layer["head"] == head]
                for name, dashes in (("entropy_nats", "-"), ("entropy_threshold_nats", (0, (3, 1.5)))):
                    runs = of_head.pivot(index="step", columns="seed", values=name)
                    mean = runs.mean(axis=1, skipna=False)
                    axes.plot(mean.index, mean, color=colours(place), linewidth=0.9, linestyle=dashes)
            axes.axhline(bound, color=INK, linewidth=0.5)
            axes.set_title(f"layer {layer}")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        hide_unused_panels(grid, len(layers))
        learned = heads["entropy_threshold_nats"].dropna()
        grid[0, 0].set_ylim(min([0.0, *learned]), 1.06 * max([bound, *learned]))
        n_seeds = heads["seed"].nunique()
        figure.supxlabel("training step" + (f" (mean over {n_seeds} seeds)" if n_seeds > 1 else ""), fontsize=7)
        figure.supylabel("nats", fontsize=7)
        figure.legend(
            handles=[
                Line2D([], [], color=INK, linewidth=0.9, label="attention entropy"),
                Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (3, 1.5)), label="learned threshold"),
                Line2D([], [], color=INK, linewidth=0.5, label=f"uniform attention, {bound:.2f}"),
            ],
            loc="outside upper center",
            ncols=3,
            fontsize=6.5,
        )
        depth_bar(figure, grid, colours, numbers, "head")
    return figure
