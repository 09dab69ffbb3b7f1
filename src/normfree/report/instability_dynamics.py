"""NaN and Inf counts by layer and step beside layer-wise entropy (ReLU's Revival, Figure 5)."""

from collections.abc import Sequence
from math import ceil

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

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
from normfree.report.style import INK, NON_FINITE, QUIET, TWO_COLUMN, depth_colours, paper_style


def instability_dynamics(layers: pd.DataFrame, layer_entropy: pd.DataFrame, *, bound: float) -> Figure:
    """A row each configuration: NaN and Inf counts by layer and step, and each layer's entropy over the same steps.

    A cell is the number of NaN and infinite values among the attention scores and the residual stream of one training
    batch, mean over seeds, on one logarithmic colour scale; no value at all leaves it plain. Entropies are means over
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
    check_frame(layer_entropy, "layer_entropy", LAYER_ENTROPY, ("entropy_nats",))
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
    n_seeds = layers.groupby("configuration")["seed"].nunique().max()
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 0.55 + 1.12 * len(configurations)), layout="constrained")
        grid = figure.subplots(len(configurations), 2, sharex=True, sharey="col", squeeze=False)
        for (left, right), configuration in zip(grid, configurations, strict=True):
            _draw_counts(left, counts.loc[configuration].reindex(names).to_numpy(), names, edges, norm)
            left.set_ylabel("layer")
            left.annotate(
                configuration,
                (0, 0.5),
                xytext=(-32, 0),
                xycoords="axes fraction",
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="center",
                fontweight="bold",
            )
            _draw_entropy(right, layer_entropy[layer_entropy["configuration"] == configuration], names, edges)
            right.axhline(bound, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.5)
            right.set_ylabel("entropy (nats)")
        finite = layer_entropy["entropy_nats"][np.isfinite(layer_entropy["entropy_nats"])]
        grid[0, 1].set_ylim(0, 1.06 * max(finite.max() if len(finite) else 0.0, bound))
        over = f" (mean over {n_seeds} seeds)" if n_seeds > 1 else ""
        grid[0, 0].set_title("NaN and Inf values")
        grid[0, 1].set_title(f"Attention entropy (dashed: uniform, {bound:.2f})")
        for axes in grid[-1]:
            axes.set_xlabel(f"training step{over}")
        if positive.size:
            bar = figure.colorbar(ScalarMappable(norm, _count_colours()), ax=grid[:, 0], aspect=40, pad=0.015)
            bar.outline.set_visible(False)
            bar.set_label("NaN and infinite values in a batch (white: none)")
        _draw_layer_bar(figure, grid[:, 1].tolist(), names)
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


def _draw_counts(axes: Axes, counts: FloatArray, layers: Sequence[int], edges: FloatArray, norm: LogNorm) -> None:
    borders = np.arange(len(layers) + 1) - 0.5
    axes.pcolormesh(edges, borders, np.ma.masked_equal(counts, 0), norm=norm, cmap=_count_colours(), linewidth=0)
    axes.set_ylim(borders[-1], borders[0])
    axes.set_xlim(edges[0], edges[-1])
    step = ceil(len(layers) / 6)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not counts.any():
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", fontsize=6.2, color=QUIET)


def _draw_entropy(axes: Axes, runs: pd.DataFrame, layers: Sequence[int], edges: FloatArray) -> None:
    colours = depth_colours(len(layers))
    entropy = runs.pivot(index="step", columns=["layer", "seed"], values="entropy_nats")
    entropy = entropy.where(np.isfinite(entropy))
    for place, layer in enumerate(layers):
        mean = pd.DataFrame(entropy[layer]).mean(axis=1, skipna=False)
        # Between two NaNs there is no line to draw, so each reading has a dot as well.
        axes.plot(mean.index, mean, "-o", color=colours(place), linewidth=1.0, markersize=1.2)
    for step in np.flatnonzero(entropy.isna().any(axis=1)):
        axes.axvspan(edges[step], edges[step + 1], zorder=0, **NON_FINITE)


def _draw_layer_bar(figure: Figure, axes: Sequence[Axes], layers: Sequence[int]) -> None:
    norm = BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers))
    bar = figure.colorbar(ScalarMappable(norm, depth_colours(len(layers))), ax=axes, aspect=40, pad=0.015)
    step = ceil(len(layers) / 12)
    bar.set_ticks(range(0, len(layers), step), labels=[str(layer) for layer in layers[::step]])
    bar.ax.tick_params(which="both", length=0)
    bar.ax.invert_yaxis()  # the first layer on top, as in the heatmaps
    bar.outline.set_visible(False)
    bar.set_label("layer")
