"""Figures of the interpretability tools, a panel a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from normfree.columns import SINK_SHARE
from normfree.errors import InputError
from normfree.report.frames import FloatArray, check_columns, check_frame, in_order
from normfree.report.primitives import (
    Panels,
    annotated_heatmap,
    colour_bar,
    depth_bar,
    integer_axis,
    layer_curves,
    legend_above,
    logarithmic_axis,
    panel_grid,
    title_panel,
)
from normfree.report.style import (
    DASHED,
    INK,
    QUIET,
    TWO_COLUMN,
    Style,
    configuration_colours,
    depth_colours,
    paper_style,
)

ATTRIBUTION_ERRORS = ("model", "layer", "head", "nmae")
EFFECTS_OF_PATCHES = ("activation_patching", "attribution_patching")
PATCHES = ("model", "layer", *EFFECTS_OF_PATCHES)
NEURON_WEIGHTS = ("model", "layer", "neuron", "weight_norm", "logit_variance")
NEURON_EFFECTS = ("model", "layer", "neuron", "total_effect_nats", "frozen_effect_nats")
CUMULATIVE_ABLATION = (
    *("model", "n_ablated", "loss_nats", "entropy_nats"),
    *("frozen_loss_nats", "frozen_entropy_nats"),
)
RESIDUAL_STDS = ("model", "layer", "position", "residual_std")
RESIDUAL_STD_RANGES = ("model", "layer", "first", "others_median", "others_min", "others_max")
SINKS = ("model", "layer", "head", SINK_SHARE)

_MOST_COLUMNS = 3
_CELL_WIDTH, _CELL_HEIGHT = 0.16, 0.1
"""Inches that a whole number of percent needs."""
_ACCENT, _OTHERS = "#D55E00", "#0072B2"
_IDENTITY: dict[str, Any] = {**DASHED, "color": QUIET, "zorder": 1}


@paper_style()
def attribution_error_heatmaps(errors: pd.DataFrame) -> Figure:
    """The error of direct logit attribution at every head, layers downwards, on one colour scale, at most 0 to 100 %.

    Titles give the median over the heads; a head without a finite error is hatched.

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
    norm, colours = Normalize(0.0, end), matplotlib.colormaps["Blues"]
    shapes = [grid.shape for grid in grids.values()]
    height = max(min(2.1 * n_layer / n_head, max(2.6, 0.1 * n_layer)) for n_layer, n_head in shapes)
    figure, panels = _panels(len(grids), row_height=0.6 + height, share=False)
    for axes, (model, grid) in zip(panels.flat, grids.items(), strict=False):
        n_layer, n_head = grid.shape
        is_roomy = height / n_layer >= _CELL_HEIGHT and 2.0 / n_head >= _CELL_WIDTH
        names: Style = {"rows": range(n_layer), "columns": range(n_head)}
        annotated_heatmap(axes, grid, norm, colours, text=_whole if is_roomy else None, fontsize=5.2, **names)
        axes.spines[:].set_visible(True)
        title_panel(axes, model, f"median {_percent(grid)}")
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
    extend = "max" if largest > end else "neither"
    percent = PercentFormatter(1.0, decimals=0 if end > 0.05 else 1, symbol=" %")
    colour_bar(figure, panels, norm, colours, "error over direct effect (NMAE)", extend=extend, format=percent)
    return figure


@paper_style()
def patching_agreement(patches: pd.DataFrame) -> Figure:
    """Attribution against activation patching, a dot a patch in the colour of its layer, the identity dashed.

    Titles give the Pearson correlation, or the number of patches that are not finite.

    Args:
        patches: model, layer, activation_patching, attribution_patching (logits); a row a patch.

    Raises:
        InputError: a column is missing, or there is no row.
    """
    check_columns(patches, "patches", PATCHES)
    check_frame(patches.assign(row=range(len(patches))), "patches", (*PATCHES, "row"), PATCHES)
    layers = sorted(in_order(patches["layer"]))
    colours = depth_colours(len(layers))
    low, high = _range(patches[list(EFFECTS_OF_PATCHES)].to_numpy(dtype=np.float64))
    models = list(_by_model(patches))
    figure, panels = _panels(len(models), row_height=2.75 if len(models) < _MOST_COLUMNS else 2.3)
    figure.set_layout_engine("compressed")  # no gaps between square panels
    for axes, (model, rows) in zip(panels.flat, models, strict=False):
        axes.plot([low, high], [low, high], **_IDENTITY)
        activation, attribution = (rows[name].to_numpy(dtype=np.float64) for name in EFFECTS_OF_PATCHES)
        places = [layers.index(layer) for layer in rows["layer"]]
        axes.scatter(activation, attribution, s=7, c=colours(places), linewidths=0, alpha=0.8, zorder=2)
        title_panel(axes, model, _correlation(activation, attribution))
        axes.set_xlabel("activation patching (logits)")
        _square(axes, (low, high), most=5)
        axes.set_aspect("equal")
    for axes in panels[:, 0]:
        axes.set_ylabel("attribution patching (logits)")
    depth_bar(figure, panels, layers, "layer")
    return figure


@paper_style()
def confidence_neurons(weights: pd.DataFrame, effects: pd.DataFrame) -> Figure:
    """LogitVar over weight norm (above); effect on the loss with the norm's std frozen over total effect (below).

    Above, the ablated neurons are marked. Below, neurons on the dashed identity do not act through the final norm;
    titles count effects that are not finite.

    Args:
        weights: model, layer, neuron, weight_norm, logit_variance; a row a neuron.
        effects: model, layer, neuron, total_effect_nats, frozen_effect_nats; a row an ablated neuron.

    Raises:
        InputError: a column is missing, a neuron occurs twice, or the frames hold other models or neurons.
    """
    check_frame(weights, "neuron weights", NEURON_WEIGHTS, NEURON_WEIGHTS[-2:])
    check_frame(effects, "neuron effects", NEURON_EFFECTS, NEURON_EFFECTS[-2:])
    ablated = effects.merge(weights, on=["model", "layer", "neuron"], how="left", indicator=True)
    if set(weights["model"]) != set(effects["model"]) or (ablated["_merge"] != "both").any():
        raise InputError("the neuron effects are of other models or neurons than the neuron weights; give both of all")
    models = in_order(weights["model"])
    high = 1.08 * _range(effects[["total_effect_nats", "frozen_effect_nats"]].to_numpy(dtype=np.float64))[1]
    width = min(TWO_COLUMN, 0.5 + 2.3 * len(models))
    figure, grid = panel_grid(2 * len(models), len(models), row_height=1.95, width=width, sharex="row", sharey="row")
    dots: Style = {"s": 11, "color": _ACCENT, "linewidths": 0, "zorder": 2}
    for (above, below), model in zip(grid.T, models, strict=True):
        every, chosen = weights[weights["model"] == model], ablated[ablated["model"] == model]
        above.scatter(every["weight_norm"], every["logit_variance"], s=4, color="#b6bcc6", linewidths=0)
        above.scatter(chosen["weight_norm"], chosen["logit_variance"], label="ablated", **dots)
        above.set_yscale("log")
        title_panel(above, model)
        above.set_xlabel("norm of output weight")
        below.plot([0, high], [0, high], **_IDENTITY)
        below.scatter(chosen["total_effect_nats"], chosen["frozen_effect_nats"], **dots)
        _square(below, (0, high), most=4)
        below.set_box_aspect(1)
        below.set_xlabel("total effect on the loss (nats)")
        broken = int((~np.isfinite(chosen[["total_effect_nats", "frozen_effect_nats"]])).any(axis=1).sum())
        if broken:
            below.set_title(f"{broken} of {len(chosen)} not finite", fontweight="normal", fontsize=6.2)
    grid[0, 0].set_ylabel("LogitVar")
    grid[1, 0].set_ylabel("effect with the norm's\nstd frozen (nats)")
    grid[0, 0].legend(loc="best", handletextpad=0.2)
    return figure


@paper_style()
def cumulative_ablation(ablation: pd.DataFrame) -> Figure:
    """Change of the loss (left) and of the output's entropy (right) by neurons ablated together, a line a model.

    Percent of the value without ablation; dashed: with the final norm's std frozen. Values that are not finite break
    the lines.

    Args:
        ablation: model, n_ablated (from 0), loss_nats, entropy_nats, frozen_loss_nats, frozen_entropy_nats.

    Raises:
        InputError: a column is missing, or a number of neurons of a model occurs twice.
    """
    check_frame(ablation, "cumulative ablation", CUMULATIVE_ABLATION, CUMULATIVE_ABLATION[2:])
    colours = configuration_colours(in_order(ablation["model"]))
    figure, grid = panel_grid(2, 2, row_height=2.2, above=0.2)
    for axes, name, label in zip(grid.flat, ("loss", "entropy"), ("loss", "output entropy"), strict=True):
        for model, rows in _by_model(ablation):
            own = rows.set_index("n_ablated").sort_index()
            for column, style in ((f"frozen_{name}_nats", DASHED), (f"{name}_nats", {"marker": "o"})):
                change = 100 * (own[column] / own[f"{name}_nats"].iloc[0] - 1)
                named = {"label": model} if style is not DASHED else {}
                axes.plot(change.index, change, **{"markersize": 2.2, **style, "color": colours[model], **named})
        axes.set_xlabel("neurons ablated together")
        axes.set_ylabel(f"change of the {label} (%)")
        integer_axis(axes)
    legend_above(figure, grid[0, 0])
    return figure


@paper_style()
def residual_std_by_position(stds: pd.DataFrame) -> Figure:
    """The std of the residual stream by position (from 1), a line a layer, both axes logarithmic.

    Stds that are not finite break the line.

    Args:
        stds: model, layer, position (from 0), residual_std.

    Raises:
        InputError: a column is missing, or a position of a layer occurs twice.
    """
    check_frame(stds, "residual stds", RESIDUAL_STDS, ("residual_std",))
    layers = sorted(in_order(stds["layer"]))
    models = list(_by_model(stds.assign(seed=0, position=stds["position"] + 1)))
    figure, panels = _panels(len(models), row_height=1.95)
    for axes, (model, rows) in zip(panels.flat, models, strict=False):
        layer_curves(axes, rows, "residual_std", layers, over="position", marker="o", markersize=1.4)
        title_panel(axes, model)
    logarithmic_axis(panels[0, 0], "x")
    logarithmic_axis(panels[0, 0], "y")
    figure.supxlabel("position (from 1)", fontsize=7)
    figure.supylabel("std of the residual stream", fontsize=7)
    depth_bar(figure, panels, layers, "layer, after its block")
    return figure


@paper_style()
def first_token_over_depth(stds: pd.DataFrame, sinks: pd.DataFrame) -> Figure:
    """A column a model: above, the residual stream's std by layer, of the first token and of all others; below, sinks.

    Above, the others' line is the median over positions and the band their range. Below, dots are the heads' attention
    to the first token, and the line their mean.

    Args:
        stds: model, layer, first (std of the first token), others_median, others_min, others_max (over positions).
        sinks: model, layer, head, sink_share; of the same models.

    Raises:
        InputError: a column is missing, a layer or a head occurs twice, or a model has no sinks.
    """
    check_frame(stds, "residual stds", RESIDUAL_STD_RANGES, RESIDUAL_STD_RANGES[2:])
    check_frame(sinks, "sinks", SINKS, (SINK_SHARE,))
    models = list(_by_model(stds))
    missing = [model for model, _ in models if model not in set(sinks["model"])]
    if missing:
        raise InputError(f"the sinks frame has no rows of the model {missing[0]!r}; give those of every model")
    n = len(models)
    figure, grid = panel_grid(2 * n, n, row_height=1.75, sharex="col", sharey="row")
    for (above, below), (model, rows) in zip(grid.T, models, strict=True):
        finite = rows.set_index("layer")[list(RESIDUAL_STD_RANGES[2:])].where(np.isfinite)
        above.fill_between(finite.index, finite["others_min"], finite["others_max"], color=_OTHERS, alpha=0.2, lw=0)
        above.plot(finite.index, finite["others_median"], color=_OTHERS, label="all other tokens: median, range")
        above.plot(finite.index, finite["first"], color=_ACCENT, label="first token")
        title_panel(above, model)
        heads = sinks.loc[sinks["model"] == model, ["layer", SINK_SHARE]].where(np.isfinite)
        below.plot(heads["layer"], heads[SINK_SHARE], "o", markersize=1.8, color=QUIET, label="a head", linewidth=0)
        mean = heads.groupby("layer")[SINK_SHARE].mean()
        below.plot(mean.index, mean, color=INK, linewidth=1.0, label="mean over heads")
        integer_axis(below)
    logarithmic_axis(grid[0, 0])
    grid[0, 0].set_ylabel("std of the\nresidual stream")
    grid[1, 0].set_ylim(-0.03, 1.03)
    grid[1, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    grid[1, 0].set_ylabel("attention to\nthe first token")
    figure.supxlabel("layer (above: after its block)", fontsize=7)
    legend_above(figure, *grid[:, 0])
    return figure


def _by_model(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for model in in_order(frame["model"]):
        yield model, frame[frame["model"] == model]


def _panels(n: int, row_height: float, share: bool | Literal["row", "col"] = True) -> tuple[Figure, Panels]:
    width = min(TWO_COLUMN, 1.0 + 2.4 * min(n, _MOST_COLUMNS))
    return panel_grid(n, _MOST_COLUMNS, row_height=row_height, width=width, sharex=share, sharey=share)


def _square(axes: Axes, limits: tuple[float, float], most: int) -> None:
    axes.set(xlim=limits, ylim=limits)
    axes.xaxis.set_major_locator(MaxNLocator(most))
    axes.yaxis.set_major_locator(MaxNLocator(most))


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


def _range(values: FloatArray) -> tuple[float, float]:
    """Axis limits for the finite ``values``."""
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


def _whole(error: float) -> str:
    """Percent without digits after the point, as many as a cell has room for."""
    return f"{100 * error:.0f}" if np.isfinite(error) else "NaN"


def _percent(errors: FloatArray) -> str:
    """The median of the finite ``errors``."""
    finite = errors[np.isfinite(errors)]
    if not finite.size:
        return "NaN"
    median = np.median(finite)
    return "below 0.1 %" if 0 < median < 0.001 else f"{100 * median:.1f} %"
