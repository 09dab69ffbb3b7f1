"""Attention entropy of heads and layers: heatmaps, shares of heads by band, and dynamics over training.

ReLU's Revival, Figures 1, 2a and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from normfree.columns import ENTROPY_NATS
from normfree.errors import unknown_name
from normfree.report.frames import (
    HEAD_ENTROPY,
    LAYER_ENTROPY,
    SETTING,
    FloatArray,
    check_frame,
    check_one_setting,
    head_grid,
    in_order,
)
from normfree.report.intervals import BAND_LABELS, BANDS, Estimate, band_shares, mean_confidence_interval
from normfree.report.primitives import (
    TITLE_CHARACTER,
    annotated_heatmap,
    depth_bar,
    fitting,
    layer_curves,
    panel_grid,
    seeds_note,
    title_panel,
)
from normfree.report.style import (
    DASHED,
    INK,
    NON_FINITE,
    ONE_COLUMN,
    QUIET,
    TWO_COLUMN,
    Style,
    configuration_colours,
    entropy_colours,
    paper_style,
)

# Inches around and between the heatmaps; their cells share what is left of the width.
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.50, 0.62, 0.28, 0.38
_GAP_X, _GAP_Y = 0.30, 0.54
_NOTE = 0.13  # a line of notes below
_TITLE_LINE = 0.13  # a further line of a title
_TICK = 0.12  # the number of a head
_BAR_WIDTH, _BAR_GAP = 0.10, 0.12
_MAX_CELL_HEIGHT, _CELL_ASPECT = 0.24, 0.72  # height of a cell, at most; height over width
_MAX_CELL_WIDTH, _MIN_WIDTH = 0.62, 1.2  # of a cell, at most; of a heatmap, at least
_PAGE = 8.5  # all rows of heatmaps, where other widths allow it
_MIN_HEIGHT = 1.35  # of a heatmap: the label of the colour bar next to it is that long

_DIGIT_EM = 0.64  # width of a digit of DejaVu Sans
_ANNOTATION_EM = 4 * _DIGIT_EM + 0.35  # four characters ("3.88") and some air have to fit into a cell
_SMALLEST_FONT, _LARGEST_FONT, _SMALLEST_BAR_FONT = 4.8, 6.5, 4.2  # points
_BOUND = "#c81e1e"

Annotate = bool | Literal["auto"]


@dataclass(frozen=True, slots=True)
class _Heatmap:
    """One configuration: ``entropy`` [n_layer, n_head] in nats, mean over seeds; its cells and texts at a width."""

    setting: tuple[str, int]
    configuration: str
    entropy: FloatArray
    layers: list[int]
    heads: list[int]
    n_seeds: int
    n_nan_seeds: int

    @classmethod
    def of(cls, run: pd.DataFrame) -> _Heatmap:
        model, context_length, configuration = run[[*SETTING, "configuration"]].iloc[0]
        stack, seeds, layers, heads = head_grid(run)
        stack = np.where(np.isfinite(stack), stack, np.nan)
        n_nan = int(np.isnan(stack).any(axis=(1, 2)).sum())
        return cls((model, context_length), configuration, stack.mean(axis=0), layers, heads, len(seeds), n_nan)

    def height(self, width: float) -> float:
        """In inches, of a heatmap ``width`` inches wide."""
        cell = min(_CELL_ASPECT * width / len(self.heads), _MAX_CELL_HEIGHT)
        return max(len(self.layers) * cell, _MIN_HEIGHT)

    def font_size(self, width: float, annotate: Annotate) -> float | None:
        """Of the texts in the cells, in points; None for no texts."""
        cell_width, cell_height = 72 * width / len(self.heads), 72 * self.height(width) / len(self.layers)
        fitting_size = min(cell_width / _ANNOTATION_EM, cell_height / 1.25, _LARGEST_FONT)
        return None if annotate is False or (annotate == "auto" and fitting_size < _SMALLEST_FONT) else fitting_size


@paper_style()
def headwise_entropy_heatmaps(
    head_entropy: pd.DataFrame, *, maximum: float | None = None, annotate: Annotate = "auto"
) -> Figure:
    """Heatmaps of attention entropy, layers downwards and heads to the right, on one colour scale from 0.

    With several seeds a heatmap is their mean, and a note says so. A head that is NaN in one of the seeds is hatched.
    Each model and context length starts a new row.

    Args:
        head_entropy: columns model, context_length, configuration, seed, layer, head, entropy_nats; any number of
            configurations, layers and heads.
        maximum: the uniform bound in nats (mean over i of ln i for causal attention), marked on the colour bar and
            included in the scale.
        annotate: write each value into its cell; ``"auto"`` omits values where cells are too small to read.

    Raises:
        InputError: a column or cell is missing, or a head occurs twice.
    """
    if annotate not in (True, False, "auto"):
        raise unknown_name("value of annotate", annotate, ("auto", "True", "False"))
    check_frame(head_entropy, "head_entropy", HEAD_ENTROPY, (ENTROPY_NATS,))
    heatmaps = [_Heatmap.of(run) for _, run in head_entropy.groupby([*SETTING, "configuration"], sort=False)]
    largest = [float(each.entropy[~np.isnan(each.entropy)].max(initial=0.0)) for each in heatmaps]
    norm = Normalize(0.0, max([*largest, maximum or 0.0]) or 1.0)
    settings = [list(group) for _, group in groupby(heatmaps, key=lambda each: each.setting)]
    rows: list[tuple[float, list[_Heatmap]]] = []  # width of a heatmap in inches, heatmaps in a row
    for group in settings:
        n_column = _columns(group, annotate)
        width = _width(n_column, max(len(each.heads) for each in group))
        rows += [(width, group[start : start + n_column]) for start in range(0, len(group), n_column)]
    heights = [max(each.height(width) for each in row) for width, row in rows]
    titles = [[_title(each.configuration, width) for each in row] for width, row in rows]
    n_line = max(title.count("\n") for row in titles for title in row)
    gap, top = _GAP_Y + _TITLE_LINE * n_line, _TOP + _TITLE_LINE * n_line
    all_rows = sum(heights) + (len(rows) - 1) * gap
    notes = _notes(heatmaps)
    total = top + all_rows + _BOTTOM + _NOTE * len(notes)
    across = _LEFT + max(len(row) * (width + _GAP_X) for width, row in rows) - _GAP_X
    figure = Figure(figsize=(across + _RIGHT, total))
    y = total - top
    for (width, row), height, names in zip(rows, heights, titles, strict=True):
        for column, (each, name) in enumerate(zip(row, names, strict=True)):
            own = each.height(width)
            axes = _placed(figure, _LEFT + column * (width + _GAP_X), y - own, width, own)
            _draw_heatmap(axes, each, width, norm, each.font_size(width, annotate))
            axes.set_title(name)
            if column == 0:
                axes.set_ylabel((f"{each.setting[0]}, T = {each.setting[1]}\n" if len(settings) > 1 else "") + "layer")
        y -= height + gap
    bar = _placed(figure, across + _BAR_GAP, total - top - all_rows, _BAR_WIDTH, all_rows)
    _draw_colour_bar(bar, figure, norm, maximum)
    for line, note in enumerate(reversed(notes)):
        figure.text(
            _LEFT / figure.get_figwidth(), (0.05 + _NOTE * line) / total, note, fontsize=6, color=QUIET, va="bottom"
        )
    return figure


def _placed(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the lower left corner."""
    across, total = figure.get_size_inches()
    return figure.add_axes((x / across, y / total, width / across, height / total))


def _width(n_column: int, n_head: int) -> float:
    """Of a heatmap of a row of ``n_column``: what the text's width leaves, or less where cells would be stretched."""
    room = (TWO_COLUMN - _LEFT - _RIGHT - (n_column - 1) * _GAP_X) / n_column
    return min(room, max(n_head * _MAX_CELL_WIDTH, _MIN_WIDTH))


def _columns(heatmaps: list[_Heatmap], annotate: Annotate) -> int:
    """Heatmaps in a row: as many as leave room for the numbers; up to four where two leave none, or fill pages."""
    most = min(len(heatmaps), 4)
    n_head = max(len(each.heads) for each in heatmaps)
    if annotate is not False:
        for n_column in dict.fromkeys((most, min(most, 2))):
            width = _width(n_column, n_head)
            n_row = ceil(len(heatmaps) / n_column)
            fits = n_row * (max(each.height(width) for each in heatmaps) + _GAP_Y) <= _PAGE or n_column == most
            if fits and all(each.font_size(width, "auto") is not None for each in heatmaps):
                return n_column
    return most


def _title(name: str, inches: float) -> str:
    """``name`` in lines that fit above a heatmap."""
    return fitting(name, inches + 0.5 * _GAP_X, TITLE_CHARACTER)


def _draw_heatmap(axes: Axes, each: _Heatmap, width: float, norm: Normalize, fontsize: float | None) -> None:
    values = each.entropy
    is_empty = bool(np.isnan(values).all())
    text = None if fontsize is None or is_empty else nats
    names: Style = {"rows": each.layers, "columns": each.heads, "most_ticks": min(12, int(width / _TICK))}
    annotated_heatmap(axes, values, norm, entropy_colours(), text=text, fontsize=fontsize or 0, **names)
    if is_empty:
        middle = ((len(each.heads) - 1) / 2, (len(each.layers) - 1) / 2)
        axes.text(*middle, "NaN", ha="center", va="center", fontsize=9, fontweight="bold", color=INK)
    axes.set_xlabel("head", labelpad=2)


def nats(entropy: float) -> str:
    """An entropy as it is written into a cell."""
    return "NaN" if np.isnan(entropy) else f"{entropy:.2f}"


def _draw_colour_bar(axes: Axes, figure: Figure, norm: Normalize, maximum: float | None) -> None:
    bar = figure.colorbar(ScalarMappable(norm, entropy_colours()), cax=axes)
    bar.outline.set_visible(False)
    bar.set_label("attention entropy (nats)", labelpad=3)
    axes.tick_params(length=2, pad=2)
    if maximum is not None:
        axes.axhline(maximum, color=_BOUND, linewidth=1.2, clip_on=False)
        place: Style = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        at = (0.0, maximum)
        axes.annotate(f"uniform {maximum:.2f}", at, (-6, 3), ha="left", fontsize=5.8, color=_BOUND, **place)


def _notes(heatmaps: list[_Heatmap]) -> list[str]:
    notes = []
    seeds = sorted({each.n_seeds for each in heatmaps})
    if seeds[-1] > 1:
        notes.append(f"Mean over {' or '.join(map(str, seeds))} seeds.")
    nan_runs = [f"{each.configuration} ({each.n_nan_seeds} of {each.n_seeds})" for each in heatmaps if each.n_nan_seeds]
    if nan_runs:
        notes.append(f"Hatched: NaN in at least one run; runs with NaN: {', '.join(nan_runs)}.")
    return notes


@paper_style()
def headwise_entropy_distribution(head_entropy: pd.DataFrame) -> Figure:
    """Share of heads in each quarter of the entropy range, bars by configuration (ReLU's Revival, Figure 2a).

    "max" is taken over the heads of all configurations (see :func:`normfree.report.band_shares`). With several seeds a
    bar is the mean, dots are the seeds and whiskers the 95 % t-interval. A diverged run makes its configuration's bars
    NaN, written in their place.

    Args:
        head_entropy: columns model, context_length, configuration, seed, layer, head, entropy_nats.

    Raises:
        InputError: a column is missing, a head occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(head_entropy, "head_entropy", HEAD_ENTROPY, (ENTROPY_NATS,))
    check_one_setting(head_entropy, "head_entropy")
    shares = band_shares(head_entropy)
    colours = configuration_colours(in_order(shares["configuration"]))
    several = bool((shares.groupby("configuration").size() > 1).any())
    figure = Figure(figsize=(TWO_COLUMN if len(colours) > 4 else ONE_COLUMN, 2.25), layout="constrained")
    axes = figure.subplots()
    bar_width = 0.84 / len(colours)
    font = _bar_font(72 * bar_width * (figure.get_figwidth() - 0.5) / 4.2)
    for i, (configuration, colour) in enumerate(colours.items()):
        runs = 100 * shares.loc[shares["configuration"] == configuration, list(BANDS)].to_numpy(dtype=np.float64)
        places = np.arange(len(BANDS)) + (i - (len(colours) - 1) / 2) * bar_width
        estimates = [mean_confidence_interval(runs[:, band]) for band in range(len(BANDS))]
        axes.bar(places, [each.mean for each in estimates], 0.92 * bar_width, color=colour, label=configuration)
        for place, estimate, values in zip(places, estimates, runs.T, strict=True):
            _annotate_bar(axes, place, estimate, values, {"color": colour, "fontweight": "bold"}, font)
    axes.set_xticks(range(len(BANDS)), BAND_LABELS, fontsize=5.6)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    note = "\n(dots: seeds, whiskers: 95 % interval of the mean)" if several else ""
    axes.set_xlabel("attention entropy of a head" + note)
    axes.set_ylabel("share of heads (%)")
    axes.set_ylim(0, min(axes.get_ylim()[1] * 1.04, 118))
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
    style: Style = {"handlelength": 1.0, "handleheight": 0.8, "columnspacing": 1.2}
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(colours), 4), **style)
    return figure


def _bar_font(width: float) -> Style:
    """Of a number of up to three digits above a bar ``width`` points wide; where it would be too small, upright."""
    size = width / (3 * _DIGIT_EM + 0.25)
    return {"fontsize": min(size, 5.2)} if size >= _SMALLEST_BAR_FONT else {"fontsize": 5.0, "rotation": 90}


def _annotate_bar(
    axes: Axes, place: float, estimate: Estimate, values: FloatArray, nan_style: Style, font: Style
) -> None:
    """The mean above a bar; seeds and interval of several runs; NaN in place of a bar that has no height."""
    is_nan = bool(np.isnan(estimate.mean))
    top = 0.0 if is_nan else estimate.mean
    if not is_nan and estimate.n > 1:
        low, high = max(estimate.low, 0.0), min(estimate.high, 100.0)
        axes.plot([place, place], [low, high], color=INK, linewidth=0.8)
        dots: Style = {"color": "white", "markersize": 2, "markeredgecolor": INK, "markeredgewidth": 0.4}
        axes.plot([place] * len(values), values, "o", **dots)
        top = max(high, *values)
    style: Style = {"color": INK, **font}
    if is_nan:
        style = {"fontsize": 5.5, "rotation": 90, **nan_style}
    text, offset = ("NaN", 3.0) if is_nan else (f"{estimate.mean:.0f}", 1.5 if estimate.n == 1 else 2.6)
    axes.annotate(text, (place, top), xytext=(0, offset), textcoords="offset points", ha="center", **style)


@paper_style()
def layerwise_entropy_dynamics(layer_entropy: pd.DataFrame, *, bound: float | None = None) -> Figure:
    """Attention entropy of each layer over training, a panel each configuration (ReLU's Revival, Figure 4).

    Lines go from light (first layer) to dark (last) and are means over seeds. From the step where a layer stops being
    finite in one of the seeds, the panel is hatched.

    Args:
        layer_entropy: columns model, context_length, configuration, seed, step, layer, entropy_nats.
        bound: the uniform bound in nats, drawn as a dashed line.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, or the frame mixes models or context lengths.
    """
    check_frame(layer_entropy, "layer_entropy", LAYER_ENTROPY, (ENTROPY_NATS,))
    check_one_setting(layer_entropy, "layer_entropy")
    configurations = in_order(layer_entropy["configuration"])
    layers = sorted(in_order(layer_entropy["layer"]))
    figure, grid = panel_grid(len(configurations), 4, row_height=1.55, above=0.35, sharex=True, sharey=True)
    for axes, configuration in zip(grid.flat, configurations, strict=False):
        runs = layer_entropy[layer_entropy["configuration"] == configuration]
        layer_curves(axes, runs, ENTROPY_NATS, layers)
        _hatch_nan(axes, runs)
        title_panel(axes, configuration)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if bound is not None:
            axes.axhline(bound, zorder=1.5, **DASHED)
    finite = layer_entropy.loc[np.isfinite(layer_entropy[ENTROPY_NATS]), ENTROPY_NATS]
    grid[0, 0].set_ylim(0, 1.17 * max([bound or 0.0, *finite]) or 1.0)
    if bound is not None:
        place: Style = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        grid[0, 0].annotate(f"uniform {bound:.2f}", (1.0, bound), (-1, 1.5), fontsize=5.8, color=INK, **place)
    figure.supxlabel("training step" + seeds_note(layer_entropy), fontsize=7)
    figure.supylabel("attention entropy (nats)", fontsize=7)
    depth_bar(figure, grid, layers, "layer")
    return figure


def _hatch_nan(axes: Axes, runs: pd.DataFrame) -> None:
    """Hatches the steps from the first entropy that is not finite, and says in how many runs there is one."""
    broken = runs[~np.isfinite(runs[ENTROPY_NATS])]
    if broken.empty:
        return
    first = broken["step"].min()
    axes.axvspan(first, runs["step"].max(), **NON_FINITE)
    note = f"NaN in {broken['seed'].nunique()} of {runs['seed'].nunique()} runs\nfrom step {first:,}"
    box: Style = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
    axes.text(0.97, 0.05, note, transform=axes.transAxes, ha="right", va="bottom", fontsize=5.8, color=INK, bbox=box)
