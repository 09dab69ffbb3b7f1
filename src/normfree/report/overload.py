"""Perplexity and entropic overload as something of the model or of its training changes in steps."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from normfree.columns import EVAL_PPL, EVAL_PPL_HIGH, EVAL_PPL_LOW
from normfree.report.frames import check_frame, in_order
from normfree.report.primitives import legend_above, panel_grid
from normfree.report.style import DASHED, Style, configuration_colours, paper_style

_MOST_TICKS = 13
CURVES = ("line", "place", "value", EVAL_PPL, EVAL_PPL_LOW, EVAL_PPL_HIGH, "top_band")


@paper_style()
def perplexity_and_overload(curves: pd.DataFrame, *, changed: str, level: Mapping[str, Any] | None = None) -> Figure:
    """Perplexity (log scale) and overload, a line a model, over what is changed.

    Args:
        curves: columns line, place (int, from the left), value (what the axis says there), eval_ppl, eval_ppl_low,
            eval_ppl_high (95 % interval, drawn where it is finite), top_band (share of heads in the top quarter of the
            entropy range, 0 to 1). A diverged run, NaN, leaves a gap.
        changed: what the values are, for the axis.
        level: a run to compare with, drawn as a dashed line: configuration, eval_ppl, top_band.

    Raises:
        InputError: a column is missing, or a line has two rows at one place.
    """
    check_frame(curves, "curves", CURVES, CURVES[2:])
    ticks = curves.drop_duplicates("place").sort_values("place")
    figure, grid = panel_grid(2, 2, row_height=2.2)
    perplexity, overload = grid.flat
    for name, colour in configuration_colours(in_order(curves["line"])).items():
        line = curves[curves["line"] == name].sort_values("place")
        reach = [line[EVAL_PPL] - line[EVAL_PPL_LOW], line[EVAL_PPL_HIGH] - line[EVAL_PPL]]
        bars = [each.fillna(0).clip(lower=0) for each in reach]
        style: Style = {"color": colour, "marker": "o", "markersize": 3}
        perplexity.errorbar(line["place"], line[EVAL_PPL], yerr=bars, elinewidth=0.8, label=name, **style)
        overload.plot(line["place"], 100 * line["top_band"], **style)
    if level is not None:
        perplexity.axhline(level[EVAL_PPL], label=level["configuration"], **DASHED)
        overload.axhline(100 * level["top_band"], **DASHED)
    perplexity.set_yscale("log")
    perplexity.yaxis.set_major_formatter("{x:g}")
    # powers of ten are too far apart for most ranges of perplexity
    perplexity.yaxis.set_major_locator(MaxNLocator(6))
    perplexity.yaxis.set_minor_locator(NullLocator())
    perplexity.set_ylabel("perplexity (log scale)")
    overload.set_ylabel("heads in the top quarter (%)")
    overload.set_ylim(0, 104)
    for axes in (perplexity, overload):
        shown = ticks.iloc[:: ceil(len(ticks) / _MOST_TICKS)]
        axes.set_xticks(shown["place"], shown["value"])
        axes.set_xlabel(changed)
    legend_above(figure, perplexity)
    return figure
