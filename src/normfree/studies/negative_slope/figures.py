"""NaN and Inf counts by layer and step next to layer-wise entropy (ReLU's Revival, Figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from normfree.columns import ENTROPY_NATS
from normfree.errors import InputError
from normfree.report.frames import (
    LAYER_ENTROPY,
    NONFINITE,
    NONFINITE_COUNTS,
    FloatArray,
    check_frame,
    check_one_setting,
    in_order,
)
from normfree.report.primitives import colour_bar, depth_bar, layer_curves, panel_grid, seeds_note
from normfree.report.style import DASHED, NON_FINITE, QUIET, Style, paper_style


@paper_style()
def instability_dynamics(layers: pd.DataFrame, layer_entropy: pd.DataFrame, *, bound: float) -> Figure:
    """A row each configuration: NaN and Inf counts by layer and step, and each layer's entropy over the same steps.

    A cell is the number of NaN and infinite values among the attention scores and the residual stream of one training
    batch, mean over seeds, on one logarithmic colour scale; no such value leaves it plain. Entropies are means over
    heads and seeds; where a layer's is NaN in a seed its line breaks off, and the steps are hatched. All panels of a
    column share their axes.

    Args:
        layers: columns model, context_length, configuration, seed, step, layer, scores_nan_count, scores_inf_count,
            residual_nan_count, residual_inf_count.
        layer_entropy: columns model, context_length, configuration, seed, step, layer, entropy_nats.
        bound: the entropy of uniform attention in nats, drawn as a dashed line.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, a frame mixes models or context lengths, or
            the two frames are not about the same configurations.
    """
    check_frame(layers, "layers", NONFINITE, NONFINITE_COUNTS)
    check_frame(layer_entropy, "layer_entropy", LAYER_ENTROPY, (ENTROPY_NATS,))
    check_one_setting(layers, "layers")
    check_one_setting(layer_entropy, "layer_entropy")
    configurations = in_order(layers["configuration"])
    if set(configurations) != set(layer_entropy["configuration"]):
        raise InputError("the layers frame and the layer_entropy frame hold other configurations; give both of all")
    counted = layers.assign(count=layers[list(NONFINITE_COUNTS)].sum(axis=1))
    counts = counted.pivot_table(index=["configuration", "layer"], columns="step", values="count", aggfunc="mean")
    names = sorted(in_order(layers["layer"]))
    edges = _edges(np.array(counts.columns, dtype=np.float64))
    positive = counts.to_numpy()[counts.to_numpy() > 0]
    norm = LogNorm(min(1.0, positive.min(initial=1.0)), max(10.0, positive.max(initial=10.0)))
    figure, grid = panel_grid(2 * len(configurations), 2, row_height=1.12, above=0.55, sharex=True, sharey="col")
    for (left, right), configuration in zip(grid, configurations, strict=True):
        _draw_counts(left, counts.loc[configuration].reindex(names).to_numpy(), names, edges, norm)
        _name_row(left, configuration)
        _draw_entropy(right, layer_entropy[layer_entropy["configuration"] == configuration], names, edges)
        right.axhline(bound, zorder=1.5, **DASHED)
    finite = layer_entropy.loc[np.isfinite(layer_entropy[ENTROPY_NATS]), ENTROPY_NATS]
    grid[0, 1].set_ylim(0, 1.06 * max([bound, *finite]))
    grid[0, 0].set_title("NaN and Inf values")
    grid[0, 1].set_title(f"Attention entropy (dashed: uniform, {bound:.2f})")
    for axes in grid[-1]:
        axes.set_xlabel("training step" + seeds_note(layers))
    if positive.size:
        colour_bar(figure, grid[:, :1], norm, _count_colours(), "NaN and infinite values in a batch (white: none)")
    depth_bar(figure, grid[:, 1:], names, "layer").ax.invert_yaxis()  # the first layer on top, as in the heatmaps
    return figure


def _edges(steps: FloatArray) -> FloatArray:
    """The borders of cells around ``steps``; a single step has a cell one step wide."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _count_colours() -> Colormap:
    """From a light red that is no white to a dark one."""
    return ListedColormap(matplotlib.colormaps["Reds"](np.linspace(0.22, 1.0, 256)), name="counts")


def _name_row(axes: Axes, configuration: str) -> None:
    style: Style = {"rotation": 90, "ha": "center", "va": "center", "fontweight": "bold"}
    offset: Style = {"xytext": (-32, 0), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(configuration, (0, 0.5), **offset, **style)


def _draw_counts(axes: Axes, counts: FloatArray, layers: Sequence[int], edges: FloatArray, norm: LogNorm) -> None:
    borders = np.arange(len(layers) + 1) - 0.5
    axes.pcolormesh(edges, borders, np.ma.masked_equal(counts, 0), norm=norm, cmap=_count_colours(), linewidth=0)
    axes.set_ylim(borders[-1], borders[0])
    axes.set_xlim(edges[0], edges[-1])
    step = ceil(len(layers) / 6)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer")
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not counts.any():
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", fontsize=6.2, color=QUIET)


def _draw_entropy(axes: Axes, runs: pd.DataFrame, layers: Sequence[int], edges: FloatArray) -> None:
    # between two NaNs there is no line to draw, so each reading has a dot as well
    layer_curves(axes, runs, ENTROPY_NATS, layers, marker="o", markersize=1.2)
    axes.set_ylabel("entropy (nats)")
    broken = (~np.isfinite(runs[ENTROPY_NATS])).groupby(runs["step"]).any()
    for place in np.flatnonzero(broken):
        axes.axvspan(edges[place], edges[place + 1], zorder=0, **NON_FINITE)
