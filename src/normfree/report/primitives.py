"""The parts that figures share: panels, curves by configuration or by layer, annotated heatmaps, keys and axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from textwrap import fill
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from normfree.report.frames import FloatArray, in_order
from normfree.report.style import INK, NON_FINITE, TWO_COLUMN, configuration_colours, depth_colours, readable_on

Panels = NDArray[Any]
"""Axes [n_row, n_column]."""
_CHARACTER = 7.0 * 0.52 / 72
"""Mean width of a character of an axis label, inches."""


def panel_grid(
    n: int,
    columns: int,
    *,
    row_height: float,
    above: float = 0.0,
    width: float = TWO_COLUMN,
    sharex: bool | Literal["row", "col"] = False,
    sharey: bool | Literal["row", "col"] = False,
) -> tuple[Figure, Panels]:
    """A figure of ``n`` panels filled row by row, at most ``columns`` in a row; panels beyond ``n`` are hidden.

    Args:
        n: at least 1.
        columns: panels in a full row.
        row_height: inches.
        above: inches for what is around the rows, such as a legend.
        width: of the figure, inches.
        sharex: as for ``Figure.subplots``.
        sharey: as for ``Figure.subplots``.
    """
    columns = min(n, columns)
    rows = ceil(n / columns)
    figure = Figure(figsize=(width, above + row_height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    for axes in grid.flat[n:]:
        axes.set_visible(False)
    for axes in grid.flat[n - columns : n]:
        axes.tick_params(labelbottom=True)
    return figure, grid


def configuration_curves(
    axes: Axes,
    frame: pd.DataFrame,
    value: str,
    *,
    over: str,
    error: str | None = None,
    broken: Sequence[str] = (),
    broken_word: str = "not finite",
    colours: dict[str, str] | None = None,
) -> None:
    """A line a configuration: the mean over seeds with their range as a band, or one seed with whiskers.

    Where a seed is not finite there is no mean; the seeds then are thin lines, and the label counts the runs.

    Args:
        axes: where to draw; lines over layers have dots.
        frame: columns configuration, seed, ``over`` and ``value``; a row a run and place.
        value: the column to draw.
        over: the column of the x axis.
        error: the column of standard errors; whiskers are 95 % intervals (1.96 standard errors).
        broken: the columns by which a run counts as not finite; default: ``value``.
        broken_word: what the label says of such runs.
        colours: by configuration; default: those of all configurations of the frame.
    """
    colours = configuration_colours(in_order(frame["configuration"])) if colours is None else colours
    style: dict[str, Any] = {"marker": "o", "markersize": 2.2} if over in ("layer", "n_dropped") else {}
    for configuration, colour in colours.items():
        runs = frame[frame["configuration"] == configuration]
        values = runs.pivot(index=over, columns="seed", values=value)
        values = values.where(np.isfinite(values))
        several = values.shape[1] > 1
        is_finite = np.isfinite(runs[list(broken or (value,))].to_numpy(dtype=np.float64)).all(axis=1)
        n_broken = runs["seed"][~is_finite].nunique()
        label = configuration
        if n_broken:
            label += f" ({n_broken} of {values.shape[1]} {broken_word})" if several else f" ({broken_word})"
            if several:
                axes.plot(values.index, values, color=colour, linewidth=0.5, alpha=0.6)
        mean = values.mean(axis=1, skipna=False)
        axes.plot(mean.index, mean, color=colour, label=label, **style)
        if several:
            whole = values.dropna()
            axes.fill_between(whole.index, whole.min(axis=1), whole.max(axis=1), color=colour, alpha=0.2, lw=0)
        elif error is not None:
            half = 1.96 * runs.set_index(over)[error].reindex(mean.index)
            axes.errorbar(mean.index, mean, half.where(np.isfinite(half)), fmt="none", ecolor=colour, elinewidth=0.7)


def layer_curves(
    axes: Axes,
    runs: pd.DataFrame,
    value: str,
    layers: Sequence[int],
    *,
    over: str = "step",
    by: str = "layer",
    colours: ListedColormap | None = None,
    **style: Any,
) -> None:
    """A line a layer, light for the first and dark for the last: the mean over seeds, NaN where one is not finite.

    Args:
        axes: where to draw.
        runs: columns seed, ``by``, ``over`` and ``value``.
        value: the column to draw.
        layers: the values of ``by``, in the order of the colours.
        over: the column of the x axis.
        by: the column that tells the lines apart.
        colours: as many as layers; default: :func:`~normfree.report.style.depth_colours`.
        style: of the lines, for ``Axes.plot``.
    """
    colours = depth_colours(len(layers)) if colours is None else colours
    for place, layer in enumerate(layers):
        values = runs[runs[by] == layer].pivot(index=over, columns="seed", values=value)
        mean = values.where(np.isfinite(values)).mean(axis=1, skipna=False)
        axes.plot(mean.index, mean, color=colours(place), **{"linewidth": 1.0, **style})


def annotated_heatmap(
    axes: Axes,
    values: FloatArray,
    norm: Normalize,
    colours: Colormap,
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    text: Callable[[float], str] | NDArray[Any] | None = None,
    fontsize: float = 6.0,
) -> None:
    """``values`` [n_row, n_column] as cells, those that are not finite hatched, with ``text`` readable on them.

    Args:
        axes: where to draw.
        values: one a cell.
        norm: from value to colour.
        colours: the colour scale.
        rows: the names of the rows, from the top; of many numbers, some are left out.
        columns: the names of the columns, likewise.
        text: what is written into each cell: a function of its value, or strings [n_row, n_column].
        fontsize: of the text, points.
    """
    axes.imshow(np.ma.masked_invalid(values), norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    for row, column in np.argwhere(~np.isfinite(values)):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **NON_FINITE))
    if text is not None:
        for (row, column), value in np.ndenumerate(values):
            written = text(value) if callable(text) else text[row, column]
            colour = readable_on(colours, float(norm(value))) if np.isfinite(value) else INK
            if written:
                axes.text(column, row, written, ha="center", va="center", fontsize=fontsize, color=colour)
    for names, set_ticks in ((rows, axes.set_yticks), (columns, axes.set_xticks)):
        step = 1 if isinstance(names[0], str) else next(n for n in (1, 2, 4, 8, 16) if len(names) <= 12 * n or n == 16)
        set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)


def colour_bar(
    figure: Figure, panels: Panels | Axes, norm: Normalize, colours: Colormap, label: str, **options: Any
) -> Colorbar:
    """The key of a colour scale, right of ``panels``; ``options`` are those of ``Figure.colorbar``."""
    n_row = len(panels) if isinstance(panels, np.ndarray) else 1
    options = {"aspect": 20 * n_row, "pad": 0.012, **options}
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, **options)
    bar.outline.set_visible(False)
    bar.set_label(fitting(label, figure.get_figheight() - 0.3))
    return bar


def depth_bar(figure: Figure, panels: Panels, numbers: Sequence[int], label: str) -> Colorbar:
    """The key of :func:`layer_curves`, right of ``panels``: a step for each of ``numbers``, at most twelve named."""
    norm = BoundaryNorm(np.arange(len(numbers) + 1) - 0.5, len(numbers))
    bar = colour_bar(figure, panels, norm, depth_colours(len(numbers)), label)
    step = ceil(len(numbers) / 12)
    bar.set_ticks(range(0, len(numbers), step), labels=[str(number) for number in numbers[::step]])
    bar.ax.tick_params(which="both", length=0)
    return bar


def fitting(label: str, inches: float) -> str:
    """``label`` of an axis, broken into lines of about one length that fit into ``inches``."""
    n_line = ceil(len(label) * _CHARACTER / inches)
    broken = (fill(label, width, break_long_words=False) for width in range(ceil(len(label) / n_line), len(label)))
    return next((each for each in broken if each.count("\n") < n_line), label)


def legend_above(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """The labels of the lines on ``axes`` as a legend above the panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels) or 1), handlelength=1.6)


def seeds_note(frame: pd.DataFrame, *, band: bool = False) -> str:
    """What an axis label adds where lines are means: ``" (mean over 3 seeds)"``; empty for one seed.

    Args:
        frame: columns configuration and seed.
        band: whether a band shows the seeds' range.
    """
    n_seeds = int(frame.groupby("configuration")["seed"].nunique().max())
    if n_seeds == 1:
        return ""
    return f" (mean of {n_seeds} seeds, band: their range)" if band else f" (mean over {n_seeds} seeds)"


def integer_axis(axes: Axes, most: int = 9) -> None:
    """An x axis of layers: ticks at at most ``most`` whole numbers, and room around a single one."""
    low, high = axes.get_xlim()
    if high - low < 1:
        middle = round((low + high) / 2)
        axes.set_xlim(middle - 0.5, middle + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def logarithmic_axis(axes: Axes, which: Literal["x", "y"] = "y") -> None:
    """A logarithmic scale whose ticks are plain numbers, also over less than a decade."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axis.get_view_interval()
    subs = (1.0,) if high / low > 50 else (1.0, 2.0, 5.0) if high / low > 3 else tuple(np.arange(1, 10, 0.5))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
    axis.set_minor_formatter(NullFormatter())
