"""Calibration, and the loss by position, of models compared on the same tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normfree.columns import LOSS_NATS
from normfree.report.frames import check_columns, check_frame, in_order
from normfree.report.primitives import legend_above, logarithmic_axis, panel_grid, title_panel, turns
from normfree.report.style import DASHED, QUIET, configuration_colours, paper_style

CALIBRATION = ("corpus", "model", "low", "high", "tokens", "confidence", "accuracy")
POSITIONS = ("corpus", "model", "position", "tokens", LOSS_NATS)


@paper_style()
def reliability_diagrams(calibration: pd.DataFrame, evaluation: pd.DataFrame) -> Figure:
    """Accuracy over confidence by bin, a panel a corpus and a line a model; on the dashed identity is calibration.

    A line in the panel gives each model's expected calibration error. Dots grow with the share of tokens in the bin.

    Args:
        calibration: corpus, model, low, high, tokens, confidence, accuracy; a row a bin.
        evaluation: corpus, model, ece.

    Raises:
        InputError: a column is missing, or a bin occurs twice.
    """
    check_frame(calibration, "calibration", CALIBRATION, CALIBRATION[3:])
    check_columns(evaluation, "evaluation", ("corpus", "model", "ece"))
    errors = evaluation.set_index(["corpus", "model"])["ece"]
    colours = configuration_colours(in_order(calibration["model"]))
    corpora = in_order(calibration["corpus"])
    figure, grid = panel_grid(len(corpora), 3, row_height=2.5, above=0.2, sharex=True, sharey=True)
    for axes, corpus in zip(grid.flat, corpora, strict=False):
        axes.plot([0, 1], [0, 1], **{**DASHED, "color": QUIET, "zorder": 1})
        for row, (model, colour) in enumerate(colours.items()):
            bins = calibration[(calibration["corpus"] == corpus) & (calibration["model"] == model)]
            bins = bins[bins["tokens"] > 0]
            axes.plot(bins["confidence"], bins["accuracy"], color=colour, linewidth=1.0, label=model)
            sizes = 2 + 40 * bins["tokens"] / bins["tokens"].sum()
            axes.scatter(bins["confidence"], bins["accuracy"], s=sizes, color=colour, linewidths=0, zorder=2)
            said = f"ECE {errors.get((corpus, model), np.nan):.3f}"
            axes.text(0.97, 0.04 + 0.07 * row, said, ha="right", color=colour, fontsize=6.2, transform=axes.transAxes)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence (largest probability)")
        axes.set_box_aspect(1)
        title_panel(axes, str(corpus))
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy")
    legend_above(figure, grid[0, 0])
    return figure


@paper_style()
def loss_by_position(positions: pd.DataFrame) -> Figure:
    """Loss over the position of the predicted token, a panel a corpus and a line a model; both axes logarithmic.

    Positions are taken together from each power of two to the next; dots are at the mean position.

    Args:
        positions: corpus, model, position (from 1), tokens, loss_nats; a row a position.

    Raises:
        InputError: a column is missing, or a position occurs twice.
    """
    check_frame(positions, "positions", POSITIONS, POSITIONS[3:])
    colours = configuration_colours(in_order(positions["model"]))
    corpora = in_order(positions["corpus"])
    figure, grid = panel_grid(len(corpora), 3, row_height=2.1, above=0.2, sharex=True, sharey=True)
    for axes, corpus in zip(grid.flat, corpora, strict=False):
        _draw_losses(axes, positions[positions["corpus"] == corpus], colours)
        title_panel(axes, str(corpus))
        axes.set_xlabel("position of the predicted token (from 1)")
    logarithmic_axis(grid[0, 0], "x")
    logarithmic_axis(grid[0, 0], "y")
    for axes in grid[:, 0]:
        axes.set_ylabel("loss (nats per token)")
    legend_above(figure, grid[0, 0])
    return figure


def _draw_losses(axes: Axes, rows: pd.DataFrame, colours: dict[str, str]) -> None:
    weighted = rows.assign(place=rows["position"] * rows["tokens"], loss=rows[LOSS_NATS] * rows["tokens"])
    octave = np.floor(np.log2(rows["position"]))
    lines = []
    for model in colours:
        own = weighted[weighted["model"] == model].groupby(octave)
        place, loss, tokens = (own[name].agg(_sum) for name in ("place", "loss", "tokens"))
        lines.append((loss / tokens).set_axis(place / tokens))
    for (model, colour), line, style in zip(colours.items(), lines, turns(lines), strict=True):
        axes.plot(line.index, line, color=colour, marker="o", markersize=2.2, label=model, **style)


def _sum(values: pd.Series[float]) -> float:
    """NaN if one of the values is."""
    return float(values.sum(skipna=False))
