"""Signal propagation and outliers over depth and over training, a panel a statistic."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from normfree.columns import RESIDUAL_KURTOSIS, RESIDUAL_MAX_OVER_MEDIAN, RESIDUAL_RMS, TOKEN_COSINE_SIMILARITY
from normfree.report.frames import SETTING, SIGNAL_STATISTICS, check_frame, check_one_setting
from normfree.report.primitives import (
    configuration_curves,
    integer_axis,
    legend_above,
    logarithmic_axis,
    panel_grid,
    seeds_note,
)
from normfree.report.style import paper_style

SIGNAL_PROPAGATION = (*SETTING, "configuration", "seed", "layer", *SIGNAL_STATISTICS)
SIGNAL_DYNAMICS = (*SETTING, "configuration", "seed", "step", "layer", *SIGNAL_STATISTICS)

_PANELS = {
    RESIDUAL_RMS: ("Residual RMS", "RMS (activation units)"),
    RESIDUAL_KURTOSIS: ("Channel kurtosis", "kurtosis (ratio, 1 to d)"),
    RESIDUAL_MAX_OVER_MEDIAN: ("Max over median", "max / median (ratio)"),
    TOKEN_COSINE_SIMILARITY: ("Token similarity", "cosine (\N{MINUS SIGN}1 to 1)"),
}
"""Title and axis label by statistic."""
_LINEAR = "token_cosine_similarity"


@paper_style()
def signal_propagation_over_depth(signal: pd.DataFrame) -> Figure:
    """Residual RMS, channel kurtosis, max over median and token similarity over the layers, a line a configuration.

    With several seeds a line is their mean, the band their range. Where one of the seeds is not finite there is no
    mean: the seeds are thin lines, and the legend counts the runs.

    Args:
        signal: columns model, context_length, configuration, seed, layer, residual_rms, residual_kurtosis,
            residual_excess_kurtosis, residual_max_over_median, token_cosine_similarity; one row a run and layer.

    Raises:
        InputError: a column is missing, a layer occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(signal, "signal propagation", SIGNAL_PROPAGATION, SIGNAL_STATISTICS)
    check_one_setting(signal, "signal propagation")
    figure, grid = panel_grid(len(_PANELS), len(_PANELS), row_height=1.95)
    for axes, (statistic, (title, _)) in zip(grid.flat, _PANELS.items(), strict=True):
        _draw(axes, signal, "layer", statistic)
        axes.set_title(title)
        integer_axis(axes, most=7)
    figure.supxlabel("layer, after its block" + seeds_note(signal, band=True), fontsize=7)
    legend_above(figure, grid[0, 0])
    return figure


@paper_style()
def signal_propagation_dynamics(dynamics: pd.DataFrame) -> Figure:
    """The same statistics over training: at the last layer (above), and at the layer with the largest (below).

    Args:
        dynamics: columns model, context_length, configuration, seed, step, layer, residual_rms, residual_kurtosis,
            residual_excess_kurtosis, residual_max_over_median, token_cosine_similarity; one row a run, step and layer.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, or the frame mixes models or context lengths.
    """
    check_frame(dynamics, "signal dynamics", SIGNAL_DYNAMICS, SIGNAL_STATISTICS)
    check_one_setting(dynamics, "signal dynamics")
    last = dynamics[dynamics["layer"] == dynamics["layer"].max()]
    largest = largest_over_layers(dynamics, ["configuration", "seed", "step"])
    n = len(_PANELS)
    figure, grid = panel_grid(2 * n, n, row_height=1.65, sharex=True, sharey="col")
    for row, (where, frame) in enumerate((("last layer", last), ("largest of all layers", largest))):
        for axes, (statistic, (title, _)) in zip(grid[row], _PANELS.items(), strict=True):
            _draw(axes, frame, "step", statistic)
            axes.set_title(f"{title}\n{where}" if row == 0 else where)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set_xlim(left=0)
    figure.supxlabel("training step" + seeds_note(dynamics, band=True), fontsize=7)
    legend_above(figure, grid[0, 0])
    return figure


def largest_over_layers(frame: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """The largest value of each statistic over the layers, by ``key``: NaN where a layer's is."""
    return frame.groupby(list(key), sort=False)[list(SIGNAL_STATISTICS)].agg(_largest).reset_index()


def _largest(values: pd.Series) -> float:
    return float(values.max(skipna=False))


def _draw(axes: Axes, frame: pd.DataFrame, over: str, statistic: str) -> None:
    configuration_curves(axes, frame, statistic, over=over, broken=SIGNAL_STATISTICS)
    axes.set_ylabel(_PANELS[statistic][1])
    if statistic != _LINEAR:
        logarithmic_axis(axes)
