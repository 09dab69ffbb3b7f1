"""Attention entropy of every head, one panel a configuration (ReLU's Revival, Figure 1)."""

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from normfree.errors import unknown_name
from normfree.report.frames import HEAD_ENTROPY, SETTING, FloatArray, check_frame, head_grid
from normfree.report.style import (
    INK,
    QUIET,
    TWO_COLUMN,
    entropy_colours,
    mark_non_finite,
    paper_style,
    readable_on,
)

# Inches around and between the panels; the cells share what is left of the width.
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.50, 0.62, 0.28, 0.38
_GAP_X, _GAP_Y = 0.30, 0.54
_NOTE = 0.13  # a line of notes beneath
_BAR_WIDTH, _BAR_GAP = 0.10, 0.12
_MAX_CELL_HEIGHT, _CELL_ASPECT = 0.24, 0.72  # height of a cell, at most; height over width

# A digit of DejaVu Sans is 0.64 em wide; four characters ("3.88") and some air have to fit into a cell.
_ANNOTATION_EM = 4 * 0.64 + 0.35
_SMALLEST_FONT, _LARGEST_FONT = 4.8, 6.5  # points


@dataclass(frozen=True, slots=True)
class _Panel:
    setting: tuple[str, int]
    configuration: str
    entropy: FloatArray  # [n_layer, n_head], nats, mean over seeds
    layers: list[int]
    heads: list[int]
    n_seeds: int
    n_nan_seeds: int


def headwise_entropy_heatmaps(
    head_entropy: pd.DataFrame,
    *,
    maximum: float | None = None,
    annotate: bool | Literal["auto"] = "auto",
) -> Figure:
    """Heatmaps of attention entropy, layers downwards and heads to the right, on one colour scale from 0.

    With several seeds a panel shows the mean over seeds, and says so. A head that is NaN in one of the seeds
    is drawn as a hatched grey cell. Frames with several models or context lengths start a new row of panels
    for each.

    Args:
        head_entropy: columns model, context_length, configuration, seed, layer, head, entropy_nats; any
            number of configurations, layers and heads.
        maximum: the uniform bound in nats (mean over i of ln i for causal attention), marked on the colour
            bar and included in the scale.
        annotate: write each value into its cell; ``"auto"`` leaves that out where the cells are too small to
            read.

    Raises:
        InputError: a column or cell is missing, or a head occurs twice.
    """
    if annotate not in (True, False, "auto"):
        raise unknown_name("value of annotate", annotate, ("auto", "True", "False"))
    check_frame(head_entropy, "head_entropy", HEAD_ENTROPY, ("entropy_nats",))
    panels = [_panel(run) for _, run in head_entropy.groupby([*SETTING, "configuration"], sort=False)]
    norm = Normalize(0.0, _scale_end(panels, maximum))
    with paper_style():
        return _draw(panels, norm, maximum, annotate)


def _panel(run: pd.DataFrame) -> _Panel:
    model, context_length, configuration = run[[*SETTING, "configuration"]].iloc[0]
    stack, seeds, layers, heads = head_grid(run)
    stack = np.where(np.isfinite(stack), stack, np.nan)
    nan_seeds = int(np.isnan(stack).any(axis=(1, 2)).sum())
    return _Panel((model, context_length), configuration, stack.mean(axis=0), layers, heads, len(seeds), nan_seeds)


def _scale_end(panels: list[_Panel], maximum: float | None) -> float:
    largest = [float(panel.entropy[~np.isnan(panel.entropy)].max(initial=0.0)) for panel in panels]
    return max([*largest, maximum or 0.0]) or 1.0


def _draw(panels: list[_Panel], norm: Normalize, maximum: float | None, annotate: bool | Literal["auto"]) -> Figure:
    settings = [list(group) for _, group in groupby(panels, key=lambda panel: panel.setting)]
    rows: list[tuple[float, list[_Panel]]] = []  # width of a panel in inches, panels side by side
    for group in settings:
        n_columns = _columns(group, annotate)
        starts = range(0, len(group), n_columns)
        rows += [(_panel_width(n_columns), group[start : start + n_columns]) for start in starts]
    heights = [max(_panel_height(width, panel) for panel in row) for width, row in rows]
    all_rows = sum(heights) + (len(rows) - 1) * _GAP_Y
    notes = _notes(panels)
    total = _TOP + all_rows + _BOTTOM + _NOTE * len(notes)
    figure = Figure(figsize=(TWO_COLUMN, total))

    def place(x: float, y: float, width: float, height: float) -> Axes:
        return figure.add_axes((x / TWO_COLUMN, y / total, width / TWO_COLUMN, height / total))

    y = total - _TOP
    for (width, row), height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            panel_height = _panel_height(width, panel)
            axes = place(_LEFT + column * (width + _GAP_X), y - panel_height, width, panel_height)
            _draw_panel(axes, panel, norm, _font_size(width, panel, annotate))
            axes.set_title(panel.configuration)
            if column == 0:
                setting = f"{panel.setting[0]}, T = {panel.setting[1]}\n" if len(settings) > 1 else ""
                axes.set_ylabel(f"{setting}layer")
        y -= height + _GAP_Y
    bar_axes = place(TWO_COLUMN - _RIGHT + _BAR_GAP, total - _TOP - all_rows, _BAR_WIDTH, all_rows)
    _draw_colour_bar(bar_axes, figure, norm, maximum)
    for line, note in enumerate(reversed(notes)):
        figure.text(_LEFT / TWO_COLUMN, (0.05 + _NOTE * line) / total, note, fontsize=6, color=QUIET, va="bottom")
    return figure


def _panel_width(n_columns: int) -> float:
    return (TWO_COLUMN - _LEFT - _RIGHT - (n_columns - 1) * _GAP_X) / n_columns


def _panel_height(width: float, panel: _Panel) -> float:
    return len(panel.layers) * _cell_height(width, panel)


def _columns(panels: list[_Panel], annotate: bool | Literal["auto"]) -> int:
    """Panels side by side: as many as leave room for the numbers; up to four where even two leave none."""
    most = min(len(panels), 4)
    if annotate is not False:
        for n_columns in dict.fromkeys((most, min(most, 2))):
            if all(_font_size(_panel_width(n_columns), panel, "auto") is not None for panel in panels):
                return n_columns
    return most


def _cell_height(width: float, panel: _Panel) -> float:
    return min(_CELL_ASPECT * width / len(panel.heads), _MAX_CELL_HEIGHT)


def _font_size(width: float, panel: _Panel, annotate: bool | Literal["auto"]) -> float | None:
    """Font size in points for the cells of a panel ``width`` inches wide; None for no numbers."""
    cell_width = 72 * width / len(panel.heads)
    fitting = min(cell_width / _ANNOTATION_EM, 72 * _cell_height(width, panel) / 1.25, _LARGEST_FONT)
    if annotate is False or (annotate == "auto" and fitting < _SMALLEST_FONT):
        return None
    return fitting


def _draw_panel(axes: Axes, panel: _Panel, norm: Normalize, font_size: float | None) -> None:
    colours = entropy_colours()
    axes.imshow(np.ma.masked_invalid(panel.entropy), norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    mark_non_finite(axes, panel.entropy)
    if font_size is not None:
        for (layer, head), value in np.ndenumerate(panel.entropy):
            label, colour = ("NaN", INK) if np.isnan(value) else (f"{value:.2f}", readable_on(colours, norm(value)))
            axes.text(head, layer, label, ha="center", va="center", fontsize=font_size, color=colour)
    elif np.isnan(panel.entropy).all():
        middle = ((len(panel.heads) - 1) / 2, (len(panel.layers) - 1) / 2)
        axes.text(*middle, "NaN", ha="center", va="center", fontsize=9, fontweight="bold", color=INK)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)
    axes.set_xticks(_ticks(len(panel.heads)), [str(panel.heads[i]) for i in _ticks(len(panel.heads))])
    axes.set_yticks(_ticks(len(panel.layers)), [str(panel.layers[i]) for i in _ticks(len(panel.layers))])
    axes.set_xlabel("head", labelpad=2)


def _ticks(n: int) -> list[int]:
    return list(range(0, n, 1 if n <= 12 else 2 if n <= 24 else 4 if n <= 48 else 8))


def _draw_colour_bar(axes: Axes, figure: Figure, norm: Normalize, maximum: float | None) -> None:
    bar = figure.colorbar(ScalarMappable(norm, entropy_colours()), cax=axes)
    bar.outline.set_visible(False)
    bar.set_label("attention entropy (nats)", labelpad=3)
    axes.tick_params(length=2, pad=2)
    if maximum is not None:
        axes.axhline(maximum, color="#c81e1e", linewidth=1.2, clip_on=False)
        axes.annotate(
            f"uniform {maximum:.2f}",
            (0, maximum),
            xytext=(-6, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="left",
            fontsize=5.8,
            color="#c81e1e",
            annotation_clip=False,
        )


def _notes(panels: list[_Panel]) -> list[str]:
    notes = []
    seeds = sorted({panel.n_seeds for panel in panels})
    if seeds[-1] > 1:
        notes.append(f"Mean over {' or '.join(map(str, seeds))} seeds.")
    nan_runs = [
        f"{panel.configuration} ({panel.n_nan_seeds} of {panel.n_seeds})" for panel in panels if panel.n_nan_seeds
    ]
    if nan_runs:
        notes.append(f"Hatched: NaN in at least one run; runs with NaN: {', '.join(nan_runs)}.")
    return notes
