"""Figures of how models use their depth: lines over the layers, a colour a configuration, and heatmaps.

Every frame names its runs by ``configuration`` and ``seed``; one run each is fine. Lines of several seeds are their
mean, bands their range; of one, whiskers are 95 % intervals (1.96 standard errors). Values that are not finite break a
line, and the legend counts the runs that have any.
"""

from dataclasses import dataclass
from math import ceil
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter, SymmetricalLogLocator

from normfree.errors import InputError
from normfree.report.frames import FloatArray, check_columns, check_frame, in_order
from normfree.report.signal_propagation import logarithmic_axis
from normfree.report.style import (
    NON_FINITE,
    QUIET,
    TWO_COLUMN,
    configuration_colours,
    hide_unused_panels,
    paper_style,
    readable_on,
)

RUN = ("configuration", "seed")
RESIDUAL_VARIANCE = (*RUN, "tokens", "layer", "residual_variance", "standard_error", "fitted_variance")
VARIANCE_GROWTH = (*RUN, "tokens", "law", "is_best")
ANGULAR_DISTANCE = (*RUN, "layer", "n_apart", "angular_distance")
LOSS_INCREASE = ("loss_increase_nats", "standard_error")
SKIPPED_LAYERS = (*RUN, "layer", *LOSS_INCREASE)
DROPPED_LAST = (*RUN, "n_dropped", *LOSS_INCREASE)
JACOBIAN_DISTANCE = (*RUN, "layer", "jacobian_distance", "standard_error")
GRADIENT_NORMS = (*RUN, "layer", "parameter_gradient_norm", "residual_gradient_norm", "standard_error")

_TOKENS = {"all": "all tokens", "without first": "all tokens but the first"}
_LINEAR_NATS = 0.01
"""Between plus and minus this loss increase the axis is linear, beyond it logarithmic."""
_LEAST_SHOWN = 1e-4
_TITLE_ROW = 80
"""Characters of the titles of one row of panels."""
_MOST_COLUMNS = 4
_MOST_LAWS = 6


@dataclass(frozen=True, slots=True)
class _Line:
    """What a panel shows of a frame: ``value`` over ``over``; ``error`` is its standard error, if it has one."""

    over: str
    value: str
    error: str | None = "standard_error"


def residual_variance_over_depth(variance: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """Variance of the residual stream by the number of blocks passed, logarithmic, with the best law of growth dashed.

    A panel each for all tokens and all but the first; a panel's legend names the laws, and how many seeds
    have each if they differ.

    Args:
        variance: columns configuration, seed, tokens, layer, residual_variance, standard_error, fitted_variance; a
            row a run, set of tokens and layer.
        growth: columns configuration, seed, tokens, law, is_best; a row a run, set of tokens and law.

    Raises:
        InputError: a column is missing, or a row occurs twice.
    """
    values = ("residual_variance", "standard_error", "fitted_variance")
    check_frame(variance, "residual variance", RESIDUAL_VARIANCE, values)
    check_frame(growth, "variance growth", VARIANCE_GROWTH, ("is_best",))
    colours = configuration_colours(in_order(variance["configuration"]))
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 2.5), layout="constrained")
        grid = figure.subplots(1, len(_TOKENS), sharey=True)
        for axes, (tokens, title) in zip(grid, _TOKENS.items(), strict=True):
            rows = variance[variance["tokens"] == tokens]
            _draw(axes, rows, _Line("layer", "residual_variance"))
            laws = growth[(growth["tokens"] == tokens) & growth["is_best"].astype(bool)]
            handles = []
            for configuration, colour in colours.items():
                fitted = rows[rows["configuration"] == configuration].groupby("layer")["fitted_variance"]
                fit = fitted.agg(lambda each: each.mean(skipna=False))
                label = _law(laws.loc[laws["configuration"] == configuration, "law"])
                handles += axes.plot(fit.index, fit, color=colour, linewidth=1.0, linestyle=(0, (4, 2)), label=label)
            if len(colours) <= _MOST_LAWS:
                axes.legend(handles=handles, title="best law of growth", title_fontsize=6.2, handlelength=2.2)
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if np.isfinite(variance["residual_variance"]).any():
            logarithmic_axis(grid[0])
        grid[0].set_ylabel("variance of the residual stream\n(squared activation units)")
        figure.supxlabel("blocks passed" + _note(variance), fontsize=7)
        _legend(figure, grid[0])
    return figure


def angular_distance_heatmaps(distances: pd.DataFrame) -> Figure:
    """Angular distance of the residual stream n blocks apart, a panel a configuration, on one colour scale from 0.

    Layers to the right, n upwards, as Gromov et al. (2024) draw it; a ring marks each n's smallest distance, the
    block that they would drop. Panels are means over seeds; cells that are not finite are hatched.

    Args:
        distances: columns configuration, seed, layer, n_apart, angular_distance (in units of π); a row a run, layer
            and n.

    Raises:
        InputError: a column or cell is missing, or a cell occurs twice.
    """
    check_frame(distances, "angular distances", ANGULAR_DISTANCE, ("angular_distance",))
    grids = {
        configuration: _triangle(distances[distances["configuration"] == configuration], configuration)
        for configuration in in_order(distances["configuration"])
    }
    largest = max(float(grid[np.isfinite(grid)].max(initial=0.0)) for grid in grids.values())
    norm, colours = Normalize(0.0, largest or 1.0), matplotlib.colormaps["viridis"]
    n_column = min(len(grids), _MOST_COLUMNS)
    n_row = ceil(len(grids) / n_column)
    width = min(TWO_COLUMN, 1.0 + 2.3 * n_column)
    with paper_style():
        height = 0.45 + 0.9 * (width - 0.9) / n_column
        figure = Figure(figsize=(width, height * n_row), layout="constrained")
        panels = figure.subplots(n_row, n_column, squeeze=False)
        for axes, (configuration, grid) in zip(panels.flat, grids.items(), strict=False):
            _draw_triangle(axes, grid, norm)
            axes.set_title(fill(configuration, _TITLE_ROW // n_column))
        hide_unused_panels(panels, len(grids))
        for axes in panels[:, 0]:
            axes.set_ylabel("blocks between, n")
        figure.supxlabel(
            "layer, at its input (ring: the smallest distance for this n)" + _note(distances, band=False), fontsize=7
        )
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, aspect=18 * n_row, pad=0.012)
        bar.outline.set_visible(False)
        bar.set_label("angular distance, last token (units of π)")
    return figure


def skipped_layer_losses(skipped: pd.DataFrame, dropped: pd.DataFrame) -> Figure:
    """What the loss gains when each layer alone is skipped (left), and when the last k are dropped (right).

    The axes are logarithmic beyond ±0.01 nats, and linear between.

    Args:
        skipped: columns configuration, seed, layer, loss_increase_nats, standard_error; a row a run and layer.
        dropped: columns configuration, seed, n_dropped, loss_increase_nats, standard_error; a row a run and number of
            dropped layers; models of one layer have none.

    Raises:
        InputError: a column is missing, or a row occurs twice.
    """
    check_frame(skipped, "skipped layers", SKIPPED_LAYERS, LOSS_INCREASE)
    check_columns(dropped, "dropped last layers", DROPPED_LAST)
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 2.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw(left, skipped, _Line("layer", "loss_increase_nats"))
        left.set_title("each layer alone skipped")
        left.set_xlabel("layer" + _note(skipped))
        if not dropped.empty:
            check_frame(dropped, "dropped last layers", DROPPED_LAST, LOSS_INCREASE)
            _draw(right, dropped, _Line("n_dropped", "loss_increase_nats"))
        right.set_title("the last k layers dropped")
        right.set_xlabel("layers dropped, k")
        increases = pd.concat([skipped, dropped])["loss_increase_nats"].to_numpy(dtype=np.float64)
        finite = increases[np.isfinite(increases)]
        for axes in (left, right):
            axes.axhline(0, color=QUIET, linewidth=0.6, zorder=1)
            axes.set_yscale("symlog", linthresh=_LINEAR_NATS, linscale=0.6)
            axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=_LINEAR_NATS))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        # room for whiskers; a loss that falls has a place below zero
        left.set_ylim(1.6 * finite.min(initial=0.0), 1.6 * finite.max(initial=_LINEAR_NATS))
        left.set_ylabel("increase of the loss (nats per token)")
        _legend(figure, left)
    return figure


def jacobian_distance_and_gradient_norms(jacobian: pd.DataFrame, gradients: pd.DataFrame) -> Figure:
    """Distance of each block's Jacobian from the identity, and gradient norms of the loss by layer, logarithmic.

    What is below ``_LEAST_SHOWN`` of a panel's largest value is below its axis: the gradients of a model that does not
    learn would press all others together.

    Args:
        jacobian: columns configuration, seed, layer, jacobian_distance, standard_error; a row a run and layer.
        gradients: columns configuration, seed, layer, parameter_gradient_norm, residual_gradient_norm,
            standard_error; a row a run and layer.

    Raises:
        InputError: a column is missing, or a row occurs twice.
    """
    check_frame(jacobian, "Jacobian distances", JACOBIAN_DISTANCE, ("jacobian_distance", "standard_error"))
    check_frame(gradients, "gradient norms", GRADIENT_NORMS, GRADIENT_NORMS[-3:])
    panels = (
        (jacobian, _Line("layer", "jacobian_distance"), "Jacobian against identity", "‖J − I‖ / √(T d)"),
        (
            gradients,
            _Line("layer", "parameter_gradient_norm", None),
            "Gradient, parameters",
            "norm (nats per unit)",
        ),
        (
            gradients,
            _Line("layer", "residual_gradient_norm"),
            "Gradient, residual stream",
            "norm (nats per unit)",
        ),
    )
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 2.1), layout="constrained")
        grid = figure.subplots(1, len(panels))
        for axes, (frame, line, title, label) in zip(grid, panels, strict=True):
            _draw(axes, frame, line)
            axes.set_title(title)
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            values = frame[line.value].to_numpy(dtype=np.float64)
            largest = values[np.isfinite(values)].max(initial=0.0)
            if largest > 0:
                logarithmic_axis(axes)
                axes.set_ylim(bottom=max(axes.get_ylim()[0], _LEAST_SHOWN * largest))
        figure.supxlabel("layer" + _note(jacobian), fontsize=7)
        _legend(figure, grid[0])
    return figure


def _draw(axes: Axes, frame: pd.DataFrame, line: _Line) -> None:
    colours = configuration_colours(in_order(frame["configuration"]))
    for configuration, colour in colours.items():
        runs = frame[frame["configuration"] == configuration]
        values = runs.pivot(index=line.over, columns="seed", values=line.value)
        is_finite = np.isfinite(values)
        broken = int((~is_finite).any(axis=0).sum())
        label = configuration + (f" ({broken} of {values.shape[1]} not finite)" if broken else "")
        values = values.where(is_finite)
        mean = values.mean(axis=1, skipna=False)
        axes.plot(mean.index, mean, "-o", color=colour, label=label, markersize=2.2)
        if values.shape[1] > 1:
            if broken:
                axes.plot(values.index, values, color=colour, linewidth=0.5, alpha=0.6)
            whole = values.dropna()
            axes.fill_between(whole.index, whole.min(axis=1), whole.max(axis=1), color=colour, alpha=0.2, lw=0)
        elif line.error is not None:
            error = 1.96 * runs.set_index(line.over)[line.error].reindex(mean.index)
            axes.errorbar(mean.index, mean, error.where(np.isfinite(error)), fmt="none", ecolor=colour, elinewidth=0.7)


def _triangle(rows: pd.DataFrame, configuration: str) -> FloatArray:
    """The mean over seeds, [n_layer, n_layer] by n less one and layer; NaN where there is no such pair."""
    n_layer = int(rows["n_apart"].max())
    grid: FloatArray = np.full((n_layer, n_layer), np.nan)
    cells = rows.groupby(["n_apart", "layer"])["angular_distance"]
    means = {place: each.mean(skipna=False) for place, each in cells}
    for n_apart in range(1, n_layer + 1):
        for layer in range(n_layer - n_apart + 1):
            if (n_apart, layer) not in means:
                raise InputError(
                    f"the angular distances frame has no row for layer {layer}, n_apart {n_apart} of "
                    f"{configuration!r}; every pair of layers needs one, with NaN where there is no value"
                )
            grid[n_apart - 1, layer] = means[n_apart, layer]
    return grid


def _draw_triangle(axes: Axes, grid: FloatArray, norm: Normalize) -> None:
    n_layer = len(grid)
    axes.imshow(
        np.ma.masked_invalid(grid),
        norm=norm,
        cmap="viridis",
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, n_layer - 0.5, 0.5, n_layer + 0.5),
    )
    for n_apart in range(1, n_layer + 1):
        row = grid[n_apart - 1, : n_layer - n_apart + 1]
        for layer in np.flatnonzero(~np.isfinite(row)):
            place = (float(layer) - 0.5, n_apart - 0.5)
            axes.add_patch(Rectangle(place, 1, 1, **NON_FINITE))
        if len(row) > 1 and np.isfinite(row).all():
            size = min(4.0, 60.0 / n_layer)
            colour = readable_on(matplotlib.colormaps["viridis"], norm(row.min()))
            axes.plot(row.argmin(), n_apart, "o", markersize=size, markerfacecolor="none", color=colour, mew=0.8)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))


def _law(laws: pd.Series) -> str:
    """The best law of the runs of a configuration; of several that differ, how many have each."""
    counts = laws.value_counts()
    if counts.empty:
        return "undecided"
    if len(counts) == 1:
        return str(counts.index[0])
    return ", ".join(f"{law} ({n})" for law, n in counts.items())


def _note(frame: pd.DataFrame, band: bool = True) -> str:
    n_seeds = frame.groupby("configuration")["seed"].nunique().max()
    if n_seeds == 1:
        return ""
    return f" (mean of {n_seeds} seeds{', band: their range' if band else ''})"


def _legend(figure: Figure, axes: Axes) -> None:
    """The configurations' colours, above the panels; ``axes`` has their lines, marked with dots."""
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    labels = [str(line.get_label()) for line in lines]
    figure.legend(lines, labels, loc="outside upper center", ncols=4, handlelength=1.6)
