"""Figures of what interpretability tools find in models with and without norms, a panel a model."""

from collections.abc import Iterator
from math import ceil
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

from normfree.errors import InputError
from normfree.report.frames import FloatArray, check_columns, check_frame, in_order
from normfree.report.style import (
    QUIET,
    TWO_COLUMN,
    depth_bar,
    depth_colours,
    hide_unused_panels,
    mark_non_finite,
    paper_style,
)

ATTRIBUTION_ERRORS = ("model", "layer", "head", "nmae")
EFFECTS_OF_PATCHES = ("activation_patching", "attribution_patching")
PATCHES = ("model", "layer", *EFFECTS_OF_PATCHES)
NEURON_WEIGHTS = ("model", "layer", "neuron", "weight_norm", "logit_variance")
NEURON_EFFECTS = ("model", "layer", "neuron", "total_effect_nats", "frozen_effect_nats")
RESIDUAL_STDS = ("model", "layer", "position", "residual_std")

_MOST_COLUMNS = 3
_ACCENT = "#D55E00"


def attribution_error_heatmaps(errors: pd.DataFrame) -> Figure:
    """The error of direct logit attribution at every head, layers downwards, on one colour scale from 0.

    A title has the median over the heads. The scale ends at 100 % at the latest, an error as large as the effect
    itself; a head without a finite error is hatched.

    Args:
        errors: model, layer, head, nmae (1 is 100 %); a row a head of each model.

    Raises:
        InputError: a column or a head is missing, or a head occurs twice.
    """
    check_frame(errors, "attribution errors", ATTRIBUTION_ERRORS, ("nmae",))
    grids = {model: _head_grid(rows, model) for model, rows in _by_model(errors)}
    finite = np.concatenate([grid[np.isfinite(grid)] for grid in grids.values()])
    largest = float(finite.max(initial=0.0))
    end = min(largest, 1.0) or 1.0
    norm = Normalize(0.0, end)
    colours = matplotlib.colormaps["Blues"]
    with paper_style():
        height = max(min(2.1 * grid.shape[0] / grid.shape[1], 2.6) for grid in grids.values())
        figure, panels = _panels(len(grids), row_height=0.6 + height, share=False)
        for axes, (model, grid) in zip(panels.flat, grids.items(), strict=False):
            axes.imshow(np.ma.masked_invalid(grid), norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
            mark_non_finite(axes, grid)
            axes.set_title(f"{model}\nmedian {_percent(grid)}")
            axes.set_xlabel("head")
            axes.set_ylabel("layer")
            axes.grid(visible=False)
            axes.spines[:].set_visible(True)
            axes.tick_params(length=0)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(8, integer=True))
        bar = figure.colorbar(
            ScalarMappable(norm, colours),
            ax=panels,
            aspect=18 * len(panels),
            pad=0.012,
            extend="max" if largest > end else "neither",
            format=PercentFormatter(1.0),
        )
        bar.outline.set_visible(False)
        bar.set_label("error over direct effect (NMAE)")
    return figure


def patching_agreement(patches: pd.DataFrame) -> Figure:
    """Attribution against activation patching, a dot a patch in the colour of its layer, the identity dashed.

    A title has the Pearson correlation; patches that are not finite are counted there, and leave no correlation.

    Args:
        patches: model, layer, activation_patching, attribution_patching (logits); a row a patch.

    Raises:
        InputError: a column is missing, or there is no row.
    """
    _check_columns(patches, "patches", PATCHES)
    layers = sorted(in_order(patches["layer"]))
    colours = depth_colours(len(layers))
    low, high = _range(patches[list(EFFECTS_OF_PATCHES)].to_numpy(dtype=np.float64))
    models = list(_by_model(patches))
    with paper_style():
        figure, panels = _panels(len(models), row_height=2.75 if len(models) < _MOST_COLUMNS else 2.3)
        figure.set_layout_engine("compressed")  # square panels leave no gaps
        for axes, (model, rows) in zip(panels.flat, models, strict=False):
            axes.plot([low, high], [low, high], color=QUIET, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
            activation, attribution = (rows[name].to_numpy(dtype=np.float64) for name in EFFECTS_OF_PATCHES)
            places = [layers.index(layer) for layer in rows["layer"]]
            axes.scatter(activation, attribution, s=7, c=colours(places), linewidths=0, alpha=0.8, zorder=2)
            axes.set_title(f"{model} ({_correlation(activation, attribution)})")
            axes.set_xlabel("activation patching (logits)")
            axes.set_xlim(low, high)
            axes.set_ylim(low, high)
            axes.set_aspect("equal")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(5))
        for axes in panels[:, 0]:
            axes.set_ylabel("attribution patching (logits)")
        depth_bar(figure, panels, colours, layers, "layer")
    return figure


def confidence_neurons(weights: pd.DataFrame, effects: pd.DataFrame) -> Figure:
    """Above, weight norm against LogitVar, the ablated neurons marked; below, their effect on the loss, with the norm's
    std frozen against in total.

    Neurons on the dashed identity do not work through the final norm. Effects that are not finite are counted.

    Args:
        weights: model, layer, neuron, weight_norm, logit_variance; a row a neuron.
        effects: model, layer, neuron, total_effect_nats, frozen_effect_nats; a row an ablated neuron.

    Raises:
        InputError: a column is missing, a neuron occurs twice, or the frames hold other models or neurons.
    """
    check_frame(weights, "neuron weights", NEURON_WEIGHTS, ("weight_norm", "logit_variance"))
    check_frame(effects, "neuron effects", NEURON_EFFECTS, ("total_effect_nats", "frozen_effect_nats"))
    key = ["model", "layer", "neuron"]
    ablated = effects.merge(weights, on=key, how="left", indicator=True)
    if set(weights["model"]) != set(effects["model"]) or (ablated["_merge"] != "both").any():
        raise InputError("the neuron effects are of other models or neurons than the neuron weights; give both of all")
    models = in_order(weights["model"])
    values = effects[["total_effect_nats", "frozen_effect_nats"]].to_numpy(dtype=np.float64)
    high = 1.08 * _range(values)[1]
    with paper_style():
        width = min(TWO_COLUMN, 0.5 + 2.3 * len(models))
        figure = Figure(figsize=(width, 3.9), layout="constrained")
        grid = figure.subplots(2, len(models), sharex="row", sharey="row", squeeze=False)
        for (above, below), model in zip(grid.T, models, strict=True):
            every, chosen = weights[weights["model"] == model], ablated[ablated["model"] == model]
            above.scatter(every["weight_norm"], every["logit_variance"], s=4, color="#b6bcc6", linewidths=0)
            above.scatter(
                chosen["weight_norm"], chosen["logit_variance"], s=11, color=_ACCENT, linewidths=0, label="ablated"
            )
            above.set_yscale("log")
            above.set_title(model)
            above.set_xlabel("norm of output weight")
            below.plot([0, high], [0, high], color=QUIET, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
            below.scatter(
                chosen["total_effect_nats"], chosen["frozen_effect_nats"], s=11, color=_ACCENT, linewidths=0, zorder=2
            )
            below.set_xlim(0, high)
            below.set_ylim(0, high)
            below.set_box_aspect(1)
            below.set_xlabel("total effect on the loss (nats)")
            below.xaxis.set_major_locator(MaxNLocator(4))
            below.yaxis.set_major_locator(MaxNLocator(4))
            broken = int((~np.isfinite(chosen[["total_effect_nats", "frozen_effect_nats"]])).any(axis=1).sum())
            if broken:
                below.set_title(f"{broken} of {len(chosen)} not finite", fontweight="normal", fontsize=6.2)
        grid[0, 0].set_ylabel("LogitVar")
        grid[1, 0].set_ylabel("effect, norm's std frozen (nats)")
        grid[0, 0].legend(loc="best", handletextpad=0.2)
    return figure


def residual_std_by_position(stds: pd.DataFrame) -> Figure:
    """The std of the residual stream by position, a line a layer, both axes logarithmic.

    Positions count from 1, so that the first has a place on the axis. Stds that are not finite break the line.

    Args:
        stds: model, layer, position (from 0), residual_std.

    Raises:
        InputError: a column is missing, or a position of a layer occurs twice.
    """
    check_frame(stds, "residual stds", RESIDUAL_STDS, ("residual_std",))
    layers = sorted(in_order(stds["layer"]))
    colours = depth_colours(len(layers))
    models = list(_by_model(stds))
    with paper_style():
        figure, panels = _panels(len(models), row_height=1.95)
        for axes, (model, rows) in zip(panels.flat, models, strict=False):
            for layer, each in rows.groupby("layer"):
                line = each.sort_values("position")
                std = line["residual_std"].where(np.isfinite(line["residual_std"]))
                axes.plot(
                    line["position"] + 1, std, "-o", color=colours(layers.index(layer)), linewidth=1.0, markersize=1.4
                )
            axes.set_title(model)
            axes.set_xscale("log")
            axes.set_yscale("log")
        for axis in (panels[0, 0].xaxis, panels[0, 0].yaxis):
            _plain_numbers(axis)
        figure.supxlabel("position (from 1)", fontsize=7)
        figure.supylabel("std of the residual stream", fontsize=7)
        depth_bar(figure, panels, colours, layers, "layer, after its block")
    return figure


def _by_model(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for model in in_order(frame["model"]):
        yield model, frame[frame["model"] == model]


def _panels(n: int, row_height: float, share: bool = True) -> tuple[Figure, NDArray[Any]]:
    """A figure with ``n`` panels in rows of at most three, and its grid of axes."""
    n_column = min(n, _MOST_COLUMNS)
    n_row = ceil(n / n_column)
    width = min(TWO_COLUMN, 1.0 + 2.4 * n_column)
    figure = Figure(figsize=(width, row_height * n_row), layout="constrained")
    grid = figure.subplots(n_row, n_column, sharex=share, sharey=share, squeeze=False)
    hide_unused_panels(grid, n)
    return figure, grid


def _head_grid(rows: pd.DataFrame, model: str) -> FloatArray:
    """The errors of one model, [n_layer, n_head]."""
    n_layer, n_head = (int(rows[name].max()) + 1 for name in ("layer", "head"))
    nmae = rows.set_index(["layer", "head"])["nmae"]
    for layer, head in np.ndindex(n_layer, n_head):
        if (layer, head) not in nmae.index:
            raise InputError(
                f"the attribution errors frame has no row for layer {layer}, head {head} of {model!r}; "
                "every layer needs all heads, with NaN where there is no value"
            )
    values: FloatArray = nmae.sort_index().to_numpy(dtype=np.float64)
    return values.reshape(n_layer, n_head)


def _check_columns(frame: pd.DataFrame, name: str, columns: tuple[str, ...]) -> None:
    """As :func:`check_frame`, for rows that are told apart by columns that the figure does not read."""
    check_columns(frame, name, columns)
    check_frame(frame.assign(row=range(len(frame))), name, (*columns, "row"), columns)


def _range(values: FloatArray) -> tuple[float, float]:
    """The limits of an axis that shows the finite ``values``."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _correlation(activation: FloatArray, attribution: FloatArray) -> str:
    broken = int((~(np.isfinite(activation) & np.isfinite(attribution))).sum())
    if broken:
        return f"{broken} of {len(activation)} not finite"
    if len(activation) < 2 or not (np.ptp(activation) and np.ptp(attribution)):
        return "no correlation"
    return f"r = {np.corrcoef(activation, attribution)[0, 1]:.3f}"


def _percent(errors: FloatArray) -> str:
    """The median of the finite ``errors``."""
    finite = errors[np.isfinite(errors)]
    if not finite.size:
        return "NaN"
    median = np.median(finite)
    return "below 0.1 %" if 0 < median < 0.001 else f"{100 * median:.1f} %"


def _plain_numbers(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, also over less than a decade."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 50 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
