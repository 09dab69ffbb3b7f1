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
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from normfree.report.frames import FloatArray, in_order
from normfree.report.style import (
    INK,
    NON_FINITE,
    QUIET,
    TWO_COLUMN,
    Style,
    configuration_colours,
    depth_colours,
    readable_on,
)

Panels = NDArray[Any]
"""Axes [n_row, n_column]."""
_CHARACTER = 7.0 * 0.52 / 72
TITLE_CHARACTER = 7.5 * 0.64 / 72
"""Mean widths of a character of an axis label and of a title, inches."""
_BAR_WIDTH = 0.09
"""Of a colour bar, inches."""
_OTHERS: Style = {"color": "#c3c8d0", "linewidth": 0.6, "zorder": 1.5}
MOST_TOGETHER = 5
"""Configurations whose lines can be told apart on one panel."""


def panel_grid(
    n: int,
    columns: int,
    *,
    row_height: float,
    above: float = 0.0,
    width: float | None = None,
    sharex: bool | Literal["row", "col"] = False,
    sharey: bool | Literal["row", "col"] = False,
) -> tuple[Figure, Panels]:
    """A figure of ``n`` panels filled row by row, at most ``columns`` in a row; panels beyond ``n`` are hidden.

    Args:
        n: at least 1.
        columns: panels in a full row.
        row_height: inches.
        above: inches for what is around the rows, such as a legend.
        width: of the figure, inches; default: the whole text, or less if that would stretch one or two panels.
        sharex: as for ``Figure.subplots``.
        sharey: as for ``Figure.subplots``.
    """
    columns = min(n, columns)
    rows = ceil(n / columns)
    width = min(TWO_COLUMN, 0.9 + 3.0 * columns) if width is None else width
    figure = Figure(figsize=(width, above + row_height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    for axes in grid.flat[n:]:
        axes.set_visible(False)
    for axes in grid.flat[n - columns : n]:
        axes.tick_params(labelbottom=True)
    return figure, grid


def family_grid(
    configurations: Sequence[str], columns: int, *, row_height: float, sharey: bool | Literal["row", "col"] = False
) -> tuple[Figure, list[tuple[dict[str, str], Panels]]]:
    """A figure with a row of ``columns`` panels for each family of configurations, and their colours with each row.

    A family is at most ``MOST_TOGETHER`` of the configurations, in their order: more lines hide each other.
    """
    families = colour_families(configurations)
    n = columns * len(families)
    figure, grid = panel_grid(n, columns, row_height=row_height, width=TWO_COLUMN, sharex="col", sharey=sharey)
    return figure, list(zip(families, grid, strict=True))


def colour_families(configurations: Sequence[str]) -> list[dict[str, str]]:
    """The configurations in families of at most ``MOST_TOGETHER``, with their colours."""
    families = np.array_split(np.array(configurations, dtype=object), ceil(len(configurations) / MOST_TOGETHER))
    return [configuration_colours(each.tolist()) for each in families]


def name_families(figure: Figure, rows: Sequence[tuple[dict[str, str], Panels]]) -> None:
    """The legend of :func:`family_grid`: above the panels for one family, right of each row for several."""
    if len(rows) == 1:
        legend_above(figure, rows[0][1][0])
        return
    for row, (_, panels) in enumerate(rows):
        handles, labels = panels[0].get_legend_handles_labels()
        if row == 0:
            handles, labels = [*handles, Line2D([], [], **_OTHERS)], [*labels, "all others"]
        panels[-1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.04), handlelength=2.0)


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
    behind: bool = False,
) -> None:
    """A line a configuration: the mean over seeds with their range as a band, or one seed with whiskers.

    Where a seed is not finite there is no mean; the seeds then are thin lines, and the label counts the runs. Lines
    that coincide take turns in dashes.

    Args:
        axes: where to draw; lines over layers have dots.
        frame: columns configuration, seed, ``over`` and ``value``; a row a run and place.
        value: the column to draw.
        over: the column of the x axis.
        error: the column of standard errors; whiskers are 95 % intervals (1.96 standard errors).
        broken: the columns by which a run counts as not finite; default: ``value``.
        broken_word: what the label says of such runs.
        colours: by configuration; default: those of all configurations of the frame.
        behind: draw the means of configurations without a colour too, thin and grey.
    """
    colours = configuration_colours(in_order(frame["configuration"])) if colours is None else colours
    runs = {str(name): each for name, each in frame.groupby("configuration", sort=False)}
    values = {name: _finite(each, over, value) for name, each in runs.items()}
    means = {name: each.mean(axis=1, skipna=False) for name, each in values.items()}
    for name in means if behind else ():
        if name not in colours:
            axes.plot(means[name].index, means[name], **_OTHERS)
    drawn = [name for name in colours if name in runs]
    dots: Style = {"marker": "o", "markersize": 2.2} if over in ("layer", "n_dropped") else {}
    for name, style in zip(drawn, turns([means[name] for name in drawn]), strict=True):
        own, mean, colour = values[name], means[name], colours[name]
        several = own.shape[1] > 1
        is_finite = np.isfinite(runs[name][list(broken or (value,))].to_numpy(dtype=np.float64)).all(axis=1)
        n_broken = runs[name]["seed"][~is_finite].nunique()
        label = name
        if n_broken:
            label += f" ({n_broken} of {own.shape[1]} {broken_word})" if several else f" ({broken_word})"
            if several:
                axes.plot(own.index, own, color=colour, linewidth=0.5, alpha=0.6)
        axes.plot(mean.index, mean, color=colour, label=label, **dots, **style)
        if several:
            whole = own.dropna()
            axes.fill_between(whole.index, whole.min(axis=1), whole.max(axis=1), color=colour, alpha=0.2, lw=0)
        elif error is not None:
            half = 1.96 * runs[name].set_index(over)[error].reindex(mean.index)
            axes.errorbar(mean.index, mean, half.where(np.isfinite(half)), fmt="none", ecolor=colour, elinewidth=0.7)


def _finite(runs: pd.DataFrame, over: str, value: str) -> pd.DataFrame:
    """The values of one configuration by ``over`` and seed, NaN where they are not finite."""
    values = runs.pivot(index=over, columns="seed", values=value)
    return values.where(np.isfinite(values))


def turns(lines: Sequence[pd.Series[float]]) -> list[Style]:
    """A style for each line, for ``Axes.plot``: those that coincide take turns in dashes and dots.

    Two lines coincide if they do at two fifths of their places: values differ by less than 1 %, and by less than 0.3 %
    of the range of all lines.
    """
    every = np.concatenate([line.to_numpy(dtype=np.float64) for line in lines]) if lines else np.zeros(0)
    tolerance = 0.003 * float(np.ptp(every[np.isfinite(every)])) if np.isfinite(every).any() else 0.0
    groups: list[list[int]] = []
    for place, line in enumerate(lines):
        group = next((each for each in groups if _coincide(lines[each[0]], line, tolerance)), None)
        groups.append([place]) if group is None else group.append(place)
    styles: list[Style] = [{} for _ in lines]
    for group in groups:
        k = len(group)
        for turn, place in enumerate(group) if k > 1 else ():
            styles[place] = {"linestyle": ((k - turn) % k * 2.5, (2.5, 2.5 * (k - 1))), "dash_capstyle": "butt"}
            if len(lines[place]) >= k:
                styles[place]["markevery"] = (turn, k)
    return styles


def _coincide(one: pd.Series[float], other: pd.Series[float], tolerance: float) -> bool:
    if not one.index.equals(other.index):
        return False
    a, b = (each.to_numpy(dtype=np.float64) for each in (one, other))
    near = (np.abs(a - b) <= tolerance) & (np.abs(a - b) <= 0.01 * np.maximum(np.abs(a), np.abs(b)))
    n_place = int((np.isfinite(a) | np.isfinite(b)).sum())
    return n_place > 0 and near.sum() >= max(0.4 * n_place, min(2, n_place))


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
    most_ticks: int = 12,
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
        most_ticks: numbers that are named along an axis, at most.
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
        step = 1 if isinstance(names[0], str) else _tick_step(len(names), most_ticks)
        set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)


def _tick_step(n: int, most: int) -> int:
    """How many of ``n`` numbers a tick stands for: a power of two, so that at most ``most`` are named."""
    return 1 << max(ceil(n / most) - 1, 0).bit_length()


def colour_bar(
    figure: Figure, panels: Panels | Axes, norm: Normalize, colours: Colormap, label: str, **options: Any
) -> Colorbar:
    """The key of a colour scale, right of ``panels``; ``options`` are those of ``Figure.colorbar``."""
    options = {"aspect": max(figure.get_figheight() - 0.5, 0.5) / _BAR_WIDTH, "pad": 0.012, **options}
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, **options)
    bar.outline.set_visible(False)
    bar.set_label(fitting(label, 1.2 * (figure.get_figheight() - 0.3)))
    return bar


def depth_bar(figure: Figure, panels: Panels, numbers: Sequence[int], label: str) -> Colorbar:
    """The key of :func:`layer_curves`, right of ``panels``: a step for each of ``numbers``, at most twelve named."""
    norm = BoundaryNorm(np.arange(len(numbers) + 1) - 0.5, len(numbers))
    bar = colour_bar(figure, panels, norm, depth_colours(len(numbers)), label)
    step = ceil(len(numbers) / 12)
    bar.set_ticks(range(0, len(numbers), step), labels=[str(number) for number in numbers[::step]])
    bar.ax.tick_params(which="both", length=0)
    return bar


def title_panel(axes: Axes, title: str, below: str = "", *, size: float = 7.5) -> None:
    """Sets ``title``, broken into lines that fit the width of the panel, and the line ``below`` it.

    A name that cannot be broken is smaller, and shortened in its middle where that would be illegible.
    """
    figure, subplot = axes.get_figure(), axes.get_subplotspec()
    assert isinstance(figure, Figure)
    assert subplot is not None
    inches = 0.87 * figure.get_figwidth() / subplot.get_gridspec().ncols
    most = int(inches / (TITLE_CHARACTER * 5 / 7.5))
    words = [
        word if len(word) <= most else f"{word[: most // 2 - 1]}…{word[-(most // 2) :]}" for word in title.split(" ")
    ]
    lines = fitting(" ".join(words), inches, TITLE_CHARACTER * size / 7.5)
    longest = max(map(len, lines.split("\n"))) * TITLE_CHARACTER / 7.5
    axes.set_title(lines + f"\n{below}" * bool(below), fontsize=min(size, inches / longest))


def explain_empty(axes: Axes, why: str) -> None:
    """Says in the middle of a panel why it is empty."""
    style: Style = {"ha": "center", "va": "center", "fontsize": 6.2, "color": QUIET}
    axes.text(0.5, 0.5, fill(why, 30), transform=axes.transAxes, **style)
    axes.grid(visible=False)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)


def fitting(label: str, inches: float, character: float = _CHARACTER) -> str:
    """``label``, broken into lines of about one length that fit into ``inches``.

    Args:
        label: of an axis.
        inches: the longest line.
        character: mean width of a character, inches; default: an axis label's.
    """
    most, words = int(inches / character), label.split()
    # A hyphen is a place to break only where a word does not fit.
    hyphens = max(map(len, words), default=0) > most
    for n_line in range(ceil(len(label) / most), len(words) + 1):
        for width in range(ceil(len(label) / n_line), most + 1):
            broken = fill(label, width, break_long_words=False, break_on_hyphens=hyphens)
            if broken.count("\n") < n_line:
                return broken
    return fill(label, most, break_long_words=False, break_on_hyphens=hyphens)


def legend_above(figure: Figure, *panels: Axes) -> None:
    """The labels of the lines on ``panels`` as a legend above them, in as many columns as fit, at most four."""
    keys = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if keys:
        handles, labels = zip(*keys, strict=True)
        room = figure.get_figwidth() - 0.1
        widths = [len(label) * _CHARACTER * 0.9 + 0.45 for label in labels]
        columns = len(labels) if len(labels) <= 4 and sum(widths) <= room else min(4, int(room / max(widths)))
        figure.legend(handles, labels, loc="outside upper center", ncols=max(columns, 1), handlelength=2.0)


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
    if high / low < 4:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
    axis.set_minor_formatter(NullFormatter())
