"""Evaluation loss over training (ReLU's Revival, Figure 2b)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from normfree.columns import EVAL_LOSS
from normfree.report.frames import EVAL_CURVE, check_frame, check_one_setting, in_order
from normfree.report.primitives import colour_families, configuration_curves, panel_grid
from normfree.report.style import ONE_COLUMN, Style, paper_style


@paper_style()
def evaluation_loss_curves(eval_curve: pd.DataFrame) -> Figure:
    """Evaluation loss over training tokens, a line per configuration (ReLU's Revival, Figure 2b).

    Of more than five configurations, each five have a panel, with all others grey behind them. With several seeds the
    line is their mean and the band their range. A mean ends where one of its seeds diverges; the seeds then are thin
    lines. A run whose loss stops being finite ends in a cross. The loss axis shows everything after the first tenth of
    the training tokens and cuts off the steep start.

    Args:
        eval_curve: columns model, context_length, configuration, seed, step, tokens, eval_loss (nats per token).

    Raises:
        InputError: a column is missing, an evaluation occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(eval_curve, "eval_curve", EVAL_CURVE, (EVAL_LOSS, "tokens"))
    check_one_setting(eval_curve, "eval_curve")
    families = colour_families(in_order(eval_curve["configuration"]))
    width = ONE_COLUMN if len(families) == 1 else None
    figure, grid = panel_grid(len(families), 3, row_height=2.25, width=width, sharex=True, sharey=True)
    bottom, top = _loss_limits(eval_curve)
    for axes, colours in zip(grid.flat, families, strict=False):
        curves: Style = {"over": "tokens", "broken_word": "diverged", "colours": colours, "behind": True}
        configuration_curves(axes, eval_curve, EVAL_LOSS, **curves)
        _mark_diverged_runs(axes, eval_curve, colours, top)
        axes.set_ylim(bottom, top)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(loc="upper right", handlelength=2.0)
    several = bool((eval_curve.groupby("configuration")["seed"].nunique() > 1).any())
    notes = ["line: mean, band: range over seeds"] * several + ["grey: all others"] * (len(families) > 1)
    figure.supxlabel("training tokens" + f" ({'; '.join(notes)})" * bool(notes), fontsize=7)
    for axes in grid[:, 0]:
        axes.set_ylabel("evaluation loss (nats per token)")
    return figure


def _loss_limits(eval_curve: pd.DataFrame) -> tuple[float, float]:
    """Up to the largest loss after the first tenth of training, but no more than at the first evaluations.

    Diverged runs do not stretch the axis, unless there are no others: their last losses can be of any size.
    """
    runs = [run for _, run in eval_curve.groupby(["configuration", "seed"])]
    steady = [run for run in runs if np.isfinite(run[EVAL_LOSS]).all()]
    shown = pd.concat(steady or runs)
    finite = shown[np.isfinite(shown[EVAL_LOSS])]
    if finite.empty:
        return 0.0, 1.0
    later = finite[finite["tokens"] >= 0.1 * eval_curve["tokens"].max()]
    first = finite.loc[finite.groupby(["configuration", "seed"])["tokens"].idxmin(), EVAL_LOSS].max()
    low, high = float(finite[EVAL_LOSS].min()), min(float(later[EVAL_LOSS].max()), float(first))
    if later.empty or high <= low:
        high = float(first) if first > low else low + 1.0
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _mark_diverged_runs(axes: Axes, eval_curve: pd.DataFrame, colours: dict[str, str], top: float) -> None:
    """A cross at the last finite loss of each diverged run of the configurations in ``colours``, at most at ``top``."""
    drawn = eval_curve[eval_curve["configuration"].isin(colours)].sort_values("tokens")
    for (configuration, _), run in drawn.groupby(["configuration", "seed"]):
        finite = run[np.isfinite(run[EVAL_LOSS])]
        if 0 < len(finite) < len(run):
            end = (float(finite["tokens"].iloc[-1]), min(float(finite[EVAL_LOSS].iloc[-1]), top))
            style: Style = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6, "clip_on": False}
            axes.plot(*end, "X", color=colours[str(configuration)], **style)
