"""Figures of signal propagation and outliers: over depth and over training, a panel a statistic."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from normfree.report.frames import SETTING, check_frame, check_one_setting, in_order
from normfree.report.style import TWO_COLUMN, configuration_colours, paper_style

SIGNAL_STATISTICS = (
    "residual_rms",
    "residual_kurtosis",
    "residual_excess_kurtosis",
    "residual_max_over_median",
    "token_cosine_similarity",
)
SIGNAL_PROPAGATION = (*SETTING, "configuration", "seed", "layer", *SIGNAL_STATISTICS)
SIGNAL_DYNAMICS = (*SETTING, "configuration", "seed", "step", "layer", *SIGNAL_STATISTICS)


@dataclass(frozen=True, slots=True)
class _Panel:
    statistic: str
    title: str
    label: str
    is_logarithmic: bool


_PANELS = (
    _Panel("residual_rms", "Residual RMS", "RMS (activation units)", True),
    _Panel("residual_kurtosis", "Channel kurtosis", "kurtosis (ratio, 1 to d)", True),
    _Panel("residual_max_over_median", "Max over median", "max / median (ratio)", True),
    _Panel("token_cosine_similarity", "Token similarity", "cosine (\N{MINUS SIGN}1 to 1)", False),
)


def signal_propagation_over_depth(signal: pd.DataFrame) -> Figure:
    """Residual RMS, channel kurtosis, max over median and token similarity over the layers, a line a configuration.

    With several seeds a line is their mean, the band their range. Where one of the seeds is not finite there is no
    mean: the others go on as thin lines, and the legend counts the runs.

    Args:
        signal: columns model, context_length, configuration, seed, layer, residual_rms, residual_kurtosis,
            residual_excess_kurtosis, residual_max_over_median, token_cosine_similarity;
            one row a run and layer.

    Raises:
        InputError: a column is missing, a layer occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(signal, "signal propagation", SIGNAL_PROPAGATION, SIGNAL_STATISTICS)
    check_one_setting(signal, "signal propagation")
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 1.95), layout="constrained")
        grid = figure.subplots(1, len(_PANELS))
        for axes, panel in zip(grid, _PANELS, strict=True):
            _draw_configurations(axes, signal, "layer", panel)
            axes.set_title(panel.title)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.supxlabel("layer, after its block" + _note(signal), fontsize=7)
        _legend(figure, grid[0])
    return figure


def signal_propagation_dynamics(dynamics: pd.DataFrame) -> Figure:
    """The same statistics over training: at the last layer (above), and at the layer with the largest (below).

    Args:
        dynamics: columns model, context_length, configuration, seed, step, layer, residual_rms, residual_kurtosis,
            residual_excess_kurtosis, residual_max_over_median, token_cosine_similarity;
            one row a run, step and layer.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, or the frame mixes models or context lengths.
    """
    check_frame(dynamics, "signal dynamics", SIGNAL_DYNAMICS, SIGNAL_STATISTICS)
    check_one_setting(dynamics, "signal dynamics")
    last = dynamics[dynamics["layer"] == dynamics["layer"].max()]
    largest = largest_over_layers(dynamics, ["configuration", "seed", "step"])
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 3.3), layout="constrained")
        grid = figure.subplots(2, len(_PANELS), sharex=True, sharey="col")
        for row, (where, frame) in enumerate((("last layer", last), ("largest of all layers", largest))):
            for axes, panel in zip(grid[row], _PANELS, strict=True):
                _draw_configurations(axes, frame, "step", panel)
                axes.set_title(f"{panel.title}\n{where}" if row == 0 else where)
                axes.xaxis.set_major_formatter(EngFormatter(sep=""))
                axes.set_xlim(left=0)
        figure.supxlabel("training step" + _note(dynamics), fontsize=7)
        _legend(figure, grid[0, 0])
    return figure


def largest_over_layers(frame: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """The largest value of each statistic over the layers, by ``key``: NaN where a layer's is."""
    return frame.groupby(list(key), sort=False)[list(SIGNAL_STATISTICS)].agg(_largest).reset_index()


def _largest(values: pd.Series) -> float:
    return float(values.max(skipna=False))


def _draw_configurations(axes: Axes, frame: pd.DataFrame, over: str, panel: _Panel) -> None:
    configurations = in_order(frame["configuration"])
    colours = configuration_colours(configurations)
    for configuration in configurations:
        runs = frame[frame["configuration"] == configuration]
        values = runs.pivot(index=over, columns="seed", values=panel.statistic)
        broken = int((~np.isfinite(runs[list(SIGNAL_STATISTICS)])).any(axis=1).groupby(runs["seed"]).any().sum())
        values = values.where(np.isfinite(values))
        label = configuration + (f" ({broken} of {values.shape[1]} not finite)" if broken else "")
        marker = "o" if over == "layer" else None
        axes.plot(
            values.index,
            values.mean(axis=1, skipna=False),
            color=colours[configuration],
            label=label,
            marker=marker,
            markersize=2.2,
        )
        if values.shape[1] > 1:
            if broken:
                axes.plot(values.index, values, color=colours[configuration], linewidth=0.5, alpha=0.6)
            whole = values.dropna()
            low, high = whole.min(axis=1), whole.max(axis=1)
            axes.fill_between(whole.index, low, high, color=colours[configuration], alpha=0.2, lw=0)
    axes.set_ylabel(panel.label)
    if panel.is_logarithmic:
        logarithmic_axis(axes)


def logarithmic_axis(axes: Axes) -> None:
    """A logarithmic scale whose ticks are plain numbers, also over less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0,) if high / low > 50 else (1.0, 2.0, 5.0) if high / low > 3 else tuple(np.arange(1, 10, 0.5))
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _note(frame: pd.DataFrame) -> str:
    n_seeds = frame.groupby("configuration")["seed"].nunique().max()
    return f" (line: mean of {n_seeds} seeds, band: their range)" if n_seeds > 1 else ""


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, handlelength=1.6)
