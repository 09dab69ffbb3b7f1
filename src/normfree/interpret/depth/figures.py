"""Figures of depth: lines over the layers, a colour a configuration, and heatmaps.

The columns ``configuration`` and ``seed`` of a frame name a run. A line is the mean over seeds, with their range as a
band; for one seed, whiskers are 95 % intervals (1.96 standard errors). Values that are not finite break a line, and the
legend counts their runs.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter, SymmetricalLogLocator

from normfree.columns import STANDARD_ERROR
from normfree.errors import InputError
from normfree.report.frames import FloatArray, check_columns, check_frame, in_order
from normfree.report.primitives import (
    colour_bar,
    configuration_curves,
    explain_empty,
    family_grid,
    integer_axis,
    legend_above,
    logarithmic_axis,
    name_families,
    panel_grid,
    seeds_note,
    title_panel,
    turns,
)
from normfree.report.style import NON_FINITE, QUIET, TWO_COLUMN, Style, paper_style, readable_on

RUN = ("configuration", "seed")
RESIDUAL_VARIANCE = (*RUN, "tokens", "layer", "residual_variance", STANDARD_ERROR, "fitted_variance")
VARIANCE_GROWTH = (*RUN, "tokens", "law", "is_best")
ANGULAR_DISTANCE = (*RUN, "layer", "n_apart", "angular_distance")
LOSS_INCREASE = ("loss_increase_nats", STANDARD_ERROR)
SKIPPED_LAYERS = (*RUN, "layer", *LOSS_INCREASE)
DROPPED_LAST = (*RUN, "n_dropped", *LOSS_INCREASE)
JACOBIAN_DISTANCE = (*RUN, "layer", "jacobian_distance", STANDARD_ERROR)
GRADIENT_NORMS = (*RUN, "layer", "parameter_gradient_norm", "residual_gradient_norm", STANDARD_ERROR)
PRUNED_LOSSES = ("model", "order", "n_dropped", *LOSS_INCREASE)

_TOKENS = {"all": "all tokens", "without first": "all tokens but the first"}
_LINEAR_NATS = 0.01
"""Loss increase below which the axis is linear, and beyond which logarithmic."""
_LEAST_SHOWN = 1e-4
_MOST_COLUMNS = 4
# Okabe and Ito's colours that no configuration has
_ORDERS = (("#009E73", "o"), ("#CC79A7", "s"), ("#332288", "^"), ("#999933", "D"))


@paper_style()
def residual_variance_over_depth(variance: pd.DataFrame, growth: pd.DataFrame) -> Figure:
    """Variance of the residual stream by the number of blocks passed, logarithmic, with the best law of growth dashed.

    A panel for all tokens and one for all but the first. Legends name the laws, and the number of seeds if they differ.

    Args:
        variance: columns configuration, seed, tokens, layer, residual_variance, standard_error, fitted_variance; a
            row a run, set of tokens and layer.
        growth: columns configuration, seed, tokens, law, is_best; a row a run, set of tokens and law.

    Raises:
        InputError: a column is missing, or a row occurs twice.
    """
    check_frame(variance, "residual variance", RESIDUAL_VARIANCE, RESIDUAL_VARIANCE[-3:])
    check_frame(growth, "variance growth", VARIANCE_GROWTH, ("is_best",))
    figure, rows = family_grid(in_order(variance["configuration"]), len(_TOKENS), row_height=2.3, sharey=True)
    for colours, panels in rows:
        for axes, tokens in zip(panels, _TOKENS, strict=True):
            of_tokens = variance[variance["tokens"] == tokens]
            best = growth[(growth["tokens"] == tokens) & growth["is_best"].astype(bool)]
            curves: Style = {"over": "layer", "error": STANDARD_ERROR, "colours": colours, "behind": True}
            configuration_curves(axes, of_tokens, "residual_variance", **curves)
            laws = _draw_laws(axes, of_tokens, best, colours)
            if len(rows) == 1:
                axes.legend(
                    laws.keys(), laws.values(), title="best law of growth", title_fontsize=6.2, handlelength=2.2
                )
            integer_axis(axes)
        panels[0].set_ylabel("residual variance\n(squared activation units)")
    for axes, title in zip(rows[0][1], _TOKENS.values(), strict=True):
        axes.set_title(title)
    if np.isfinite(variance["residual_variance"]).any():
        logarithmic_axis(rows[0][1][0])
    figure.supxlabel("blocks passed" + seeds_note(variance, band=True), fontsize=7)
    name_families(figure, rows)
    return figure


def _draw_laws(axes: Axes, variance: pd.DataFrame, best: pd.DataFrame, colours: dict[str, str]) -> dict[Line2D, str]:
    """A dashed line for each configuration's law of growth, with the law's name."""
    laws = {}
    for configuration, colour in colours.items():
        fitted = variance[variance["configuration"] == configuration].groupby("layer")["fitted_variance"]
        fit = fitted.agg(lambda each: each.mean(skipna=False))
        (line,) = axes.plot(fit.index, fit, color=colour, linewidth=1.0, linestyle=(0, (4, 2)))
        laws[line] = _law(best.loc[best["configuration"] == configuration, "law"])
    return laws


@paper_style()
def angular_distance_heatmaps(distances: pd.DataFrame) -> Figure:
    """Angular distance of the residual stream n blocks apart, a panel a configuration, on one colour scale from 0.

    Layers to the right, n upwards, as in Gromov et al. (2024); a ring marks each n's smallest distance, across the
    layers that they would drop. Panels are means over seeds; cells that are not finite are hatched.

    Args:
        distances: columns configuration, seed, layer, n_apart, angular_distance (in units of π); a row a run, layer
            and n.

    Raises:
        InputError: a column or cell is missing, or a cell occurs twice.
    """
    check_frame(distances, "angular distances", ANGULAR_DISTANCE, ("angular_distance",))
    triangles = {
        configuration: _triangle(distances[distances["configuration"] == configuration], configuration)
        for configuration in in_order(distances["configuration"])
    }
    largest = max(float(each[np.isfinite(each)].max(initial=0.0)) for each in triangles.values())
    norm, colours = Normalize(0.0, largest or 1.0), matplotlib.colormaps["viridis"]
    n_column = min(len(triangles), _MOST_COLUMNS)
    width = min(TWO_COLUMN, 1.0 + 2.3 * n_column)
    height = 0.45 + 0.9 * (width - 0.9) / n_column
    figure, panels = panel_grid(len(triangles), _MOST_COLUMNS, row_height=height, width=width)
    for axes, (configuration, triangle) in zip(panels.flat, triangles.items(), strict=False):
        _draw_triangle(axes, triangle, norm)
        title_panel(axes, configuration)
    for axes in panels[:, 0]:
        axes.set_ylabel("blocks between, n")
    label = "layer, at its input (ring: the smallest distance for this n)" + seeds_note(distances)
    figure.supxlabel(label, fontsize=7)
    colour_bar(figure, panels, norm, colours, "angular distance, last token (units of π)")
    return figure


@paper_style()
def skipped_layer_losses(skipped: pd.DataFrame, dropped: pd.DataFrame) -> Figure:
    """Increase of the loss when each layer alone is skipped (left), and when the last k are dropped (right).

    Axes are linear up to ±0.01 nats, logarithmic beyond.

    Args:
        skipped: columns configuration, seed, layer, loss_increase_nats, standard_error; a row a run and layer.
        dropped: columns configuration, seed, n_dropped, loss_increase_nats, standard_error; a row a run and number of
            dropped layers, none for models of one layer.

    Raises:
        InputError: a column is missing, or a row occurs twice.
    """
    check_frame(skipped, "skipped layers", SKIPPED_LAYERS, LOSS_INCREASE)
    check_columns(dropped, "dropped last layers", DROPPED_LAST)
    if not dropped.empty:
        check_frame(dropped, "dropped last layers", DROPPED_LAST, LOSS_INCREASE)
    figure, rows = family_grid(in_order(skipped["configuration"]), 2, row_height=2.2, sharey=True)
    for colours, (left, right) in rows:
        for axes, frame, over in ((left, skipped, "layer"), (right, dropped, "n_dropped")):
            curves: Style = {"over": over, "error": STANDARD_ERROR, "colours": colours, "behind": True}
            configuration_curves(axes, frame, "loss_increase_nats", **curves)
            axes.axhline(0, color=QUIET, linewidth=0.6, zorder=1)
            _symmetric_log(axes)
            integer_axis(axes)
        if dropped.empty:
            explain_empty(right, "one layer: without it nothing is left")
        left.set_ylabel("loss increase (nats per token)")
    (first, second), (last_left, last_right) = rows[0][1], rows[-1][1]
    # Room for whiskers, and below zero for a loss that falls.
    increases = pd.concat([skipped, dropped])["loss_increase_nats"].to_numpy(dtype=np.float64)
    finite = increases[np.isfinite(increases)]
    first.set_ylim(1.6 * finite.min(initial=0.0), 1.6 * finite.max(initial=_LINEAR_NATS))
    first.set_title("each layer alone skipped")
    second.set_title("the last k layers dropped")
    last_left.set_xlabel("layer" + seeds_note(skipped, band=True))
    last_right.set_xlabel("layers dropped, k")
    name_families(figure, rows)
    return figure


def _symmetric_log(axes: Axes) -> None:
    axes.set_yscale("symlog", linthresh=_LINEAR_NATS, linscale=0.6)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=_LINEAR_NATS))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@paper_style()
def jacobian_distance_and_gradient_norms(jacobian: pd.DataFrame, gradients: pd.DataFrame) -> Figure:
    """Distance of each block's Jacobian from the identity, and gradient norms of the loss by layer, logarithmic.

    An axis begins at 1e-4 of its panel's largest value: the tiny gradients of a model that does not learn would
    compress all others.

    Args:
        jacobian: columns configuration, seed, layer, jacobian_distance, standard_error; a row a run and layer.
        gradients: columns configuration, seed, layer, parameter_gradient_norm, residual_gradient_norm,
            standard_error; a row a run and layer.

    Raises:
        InputError: a column is missing, or a row occurs twice.
    """
    check_frame(jacobian, "Jacobian distances", JACOBIAN_DISTANCE, JACOBIAN_DISTANCE[-2:])
    check_frame(gradients, "gradient norms", GRADIENT_NORMS, GRADIENT_NORMS[-3:])
    error, norm = STANDARD_ERROR, "norm (nats per unit)"
    panels = (
        (jacobian, "jacobian_distance", error, "Jacobian − identity", "‖J − I‖ / √(T d)"),
        (gradients, "parameter_gradient_norm", None, "Parameter gradient", norm),
        (gradients, "residual_gradient_norm", error, "Residual gradient", norm),
    )
    figure, rows = family_grid(in_order(jacobian["configuration"]), len(panels), row_height=2.0, sharey="col")
    for colours, row in rows:
        for axes, (frame, value, error_column, _, label) in zip(row, panels, strict=True):
            curves: Style = {"over": "layer", "error": error_column, "colours": colours, "behind": True}
            configuration_curves(axes, frame, value, **curves)
            axes.set_ylabel(label)
            integer_axis(axes)
    for axes, (frame, value, _, title, _) in zip(rows[0][1], panels, strict=True):
        axes.set_title(title)
        values = frame[value].to_numpy(dtype=np.float64)
        largest = values[np.isfinite(values)].max(initial=0.0)
        if largest > 0:
            logarithmic_axis(axes)
            axes.set_ylim(bottom=max(axes.get_ylim()[0], _LEAST_SHOWN * largest))
    figure.supxlabel("layer" + seeds_note(jacobian, band=True), fontsize=7)
    name_families(figure, rows)
    return figure


@paper_style()
def pruned_layer_losses(losses: pd.DataFrame) -> Figure:
    """A panel a model: the increase of the loss over the number of layers dropped, a line an order of dropping.

    Whiskers are 95 % intervals (1.96 standard errors); increases that are not finite break the line.

    Args:
        losses: model, order, n_dropped, loss_increase_nats, standard_error.

    Raises:
        InputError: a column is missing, a number of an order occurs twice, or there are more than four orders.
    """
    check_frame(losses, "pruned losses", PRUNED_LOSSES, LOSS_INCREASE)
    models, orders = in_order(losses["model"]), in_order(losses["order"])
    if len(orders) > len(_ORDERS):
        raise InputError(f"the pruned losses frame has {len(orders)} orders; at most {len(_ORDERS)} can be told apart")
    width = min(TWO_COLUMN, 0.6 + 3.0 * len(models))
    figure, grid = panel_grid(len(models), len(models), row_height=2.4, width=width, sharey=True)
    for axes, model in zip(grid.flat, models, strict=True):
        of_model = losses[losses["model"] == model].set_index("n_dropped").sort_index()
        lines = [of_model.loc[of_model["order"] == order, list(LOSS_INCREASE)] for order in orders]
        lines = [line.where(np.isfinite(line)) for line in lines]
        styles = turns([line["loss_increase_nats"] for line in lines])
        for order, line, (colour, marker), turn in zip(orders, lines, _ORDERS, styles, strict=False):
            style: Style = {"color": colour, "marker": marker, "markersize": 3, "label": order, **turn}
            axes.errorbar(line.index, line["loss_increase_nats"], 1.96 * line[STANDARD_ERROR], elinewidth=0.7, **style)
        axes.axhline(0, color=QUIET, linewidth=0.6, zorder=1)
        title_panel(axes, model)
        integer_axis(axes)
        axes.set_xlabel("layers dropped")
    grid[0, 0].set_ylabel("loss increase (nats per token)")
    legend_above(figure, grid[0, 0])
    return figure


def _triangle(rows: pd.DataFrame, configuration: str) -> FloatArray:
    """The mean over seeds, [n_layer, n_layer] by n_apart − 1 and layer; NaN if there is no such pair."""
    n_layer = int(rows["n_apart"].max())
    cells = rows.groupby(["n_apart", "layer"])["angular_distance"].agg(lambda each: each.mean(skipna=False))
    pairs = [(n_apart, layer) for n_apart in range(1, n_layer + 1) for layer in range(n_layer - n_apart + 1)]
    for n_apart, layer in pairs:
        if (n_apart, layer) not in cells.index:
            raise InputError(
                f"the angular distances frame has no row for layer {layer}, n_apart {n_apart} of "
                f"{configuration!r}; every pair of layers needs one, with NaN where there is no value"
            )
    return cells.loc[pairs].unstack().to_numpy(dtype=np.float64)


def _draw_triangle(axes: Axes, grid: FloatArray, norm: Normalize) -> None:
    n_layer = len(grid)
    extent = (-0.5, n_layer - 0.5, 0.5, n_layer + 0.5)
    style: Style = {"origin": "lower", "aspect": "auto", "interpolation": "nearest", "extent": extent}
    axes.imshow(np.ma.masked_invalid(grid), norm=norm, cmap="viridis", **style)
    for n_apart in range(1, n_layer + 1):
        row = grid[n_apart - 1, : n_layer - n_apart + 1]
        for layer in np.flatnonzero(~np.isfinite(row)):
            axes.add_patch(Rectangle((float(layer) - 0.5, n_apart - 0.5), 1, 1, **NON_FINITE))
        if len(row) > 1 and np.isfinite(row).all():
            size = min(4.0, 60.0 / n_layer)
            colour = readable_on(matplotlib.colormaps["viridis"], norm(row.min()))
            axes.plot(row.argmin(), n_apart, "o", markersize=size, markerfacecolor="none", color=colour, mew=0.8)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))


def _law(laws: pd.Series) -> str:
    """The best law of a configuration's runs; if they differ, each with its number of runs."""
    counts = laws.value_counts()
    shown = [f"{law} ({n})" if len(counts) > 1 else str(law) for law, n in counts.items()]
    return ", ".join(shown) or "undecided"
