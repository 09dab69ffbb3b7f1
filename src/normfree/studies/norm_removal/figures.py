"""Figures of norm removal: the loss while the norms go, and the tokens it takes by model size."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from normfree.columns import LOSS_NATS
from normfree.errors import InputError
from normfree.removal.curve import VARIANT_COLOURS
from normfree.removal.layout import NORM_FREE, VANILLA
from normfree.report.frames import check_frame, in_order
from normfree.report.primitives import panel_grid, title_panel
from normfree.report.style import DASHED, INK, QUIET, TWO_COLUMN, Style, depth_colours, paper_style
from normfree.studies.norm_removal.tables import PowerLaw

CURVES = ("configuration", "variant", "step", LOSS_NATS)
REMOVED = ("configuration", "step", "part", "layer")
EXCESS = ("size", "parameters", "seed", "finetuning_tokens", "excess_nats")
REACHED = ("size", "parameters", "seed", "tokens", "bound")
_PARTS = {
    "ffn": "before the FFN",
    "attention_qk": "before Q and K",
    "attention_v": "before V",
    "final": "final norm",
    "end_of_text": "end-of-text",
    "first_token": "first token",
}
_PART_COLOURS = dict(zip(_PARTS, ("#009E73", "#332288", "#CC79A7", "#882255", "#999933", "#44AA99"), strict=True))
_BOUNDS = {
    "interpolated": ("o", "interpolated"),
    "at most": ("v", "at most this"),
    "more than": ("^", "more than this"),
}
"""Marker and label by the kind of bound."""
_SMOOTHED_STEPS = 40
"""A curve is smoothed over one of that many parts of it: the loss of a single batch is noise."""


@paper_style()
def removal_loss_curves(curves: pd.DataFrame, removed: pd.DataFrame) -> Figure:
    """Training loss with the norms kept and going, below it their difference, and above it when which norms go.

    Both runs see the same batches, so the difference has little of the batches' noise. Thin: each step; thick: the
    running mean. Losses that are not finite break the lines.

    Args:
        curves: configuration, variant (vanilla, norm-free), step (from 1), loss_nats; one run each.
        removed: configuration, step, part, layer: what goes before which step.

    Raises:
        InputError: a column is missing, or a step of a run occurs twice.
    """
    check_frame(curves, "curves", CURVES, (LOSS_NATS,))
    check_frame(removed, "removed", REMOVED, ())
    configurations = in_order(curves["configuration"])
    n = len(configurations)
    figure = Figure(figsize=(min(TWO_COLUMN, 1.6 + 2.0 * n), 3.2), layout="constrained")
    grid = figure.subplots(3, n, sharex="col", sharey="row", squeeze=False, height_ratios=(0.5, 1.5, 1))
    for (when, above, below), configuration in zip(grid.T, configurations, strict=True):
        own = curves[curves["configuration"] == configuration]
        losses = own.pivot(index="step", columns="variant", values=LOSS_NATS)
        window = max(1, len(losses) // _SMOOTHED_STEPS)
        shown = [variant for variant in (VANILLA, NORM_FREE) if variant in losses]
        for variant in shown:
            _line(above, losses[variant], window, VARIANT_COLOURS[variant])
        if len(shown) == 2:
            below.axhline(0, **{**DASHED, "color": QUIET})
            _line(below, losses[NORM_FREE] - losses[VANILLA], window, INK)
        _draw_removals(when, removed[removed["configuration"] == configuration])
        title_panel(when, configuration)
        below.set_xlabel("fine-tuning step")
        below.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    grid[0, 0].set_ylabel("removed", rotation=0, ha="right", va="center")
    grid[1, 0].set_ylabel("training loss (nats)")
    grid[2, 0].set_ylabel("norm-free less\nvanilla (nats)")
    named = {_PARTS[part]: colour for part, colour in _PART_COLOURS.items() if part in set(removed["part"])}
    keys = {name: Line2D([], [], color=colour) for name, colour in {**VARIANT_COLOURS, **named}.items()}
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", ncols=4)
    return figure


@paper_style()
def removal_scaling(excess: pd.DataFrame, reached: pd.DataFrame, fit: PowerLaw, *, threshold: float) -> Figure:
    """Left, the loss above the original's by budget, a line a size; right, the tokens to the threshold by size.

    On the right a dot is a size and seed, an arrow one that no budget was small or large enough for, and the line the
    power law through the dots.

    Args:
        excess: size, parameters, seed, finetuning_tokens, excess_nats (NaN: diverged).
        reached: size, parameters, seed, tokens, bound (see :class:`~normfree.studies.norm_removal.tables.Reached`).
        fit: the law of tokens against parameters.
        threshold: in nats.

    Raises:
        InputError: a column is missing, or a row occurs twice.
    """
    check_frame(excess, "excess", EXCESS, ("excess_nats",))
    check_frame(reached, "reached", REACHED, ("tokens", "bound"))
    sizes = in_order(excess.sort_values("parameters")["size"])
    if not set(reached["size"]) <= set(sizes):
        raise InputError("the reached frame has sizes that the excess frame has not; give both of all")
    figure, grid = panel_grid(2, 2, row_height=2.5)
    left, right = grid.flat
    _draw_excess(left, excess, sizes)
    left.axhline(threshold, **{**DASHED, "color": QUIET})
    _draw_reached(right, reached, sizes)
    if np.isfinite(fit.exponent):
        ends = np.array([reached["parameters"].min(), reached["parameters"].max()], dtype=np.float64)
        interval = f" [{fit.low:.2f}, {fit.high:.2f}]" if np.isfinite(fit.low) else ""
        label = f"tokens ∝ parameters$^{{{fit.exponent:.2f}}}${interval}"
        right.plot(ends, fit.factor * ends**fit.exponent, color=INK, linewidth=1.0, label=label)
    else:
        right.set_title("no power law: fewer than two sizes reach it", fontsize=6.2, fontweight="normal")
    right.set_ylabel(f"tokens to within {threshold:g} nats")
    right.set(xscale="log", yscale="log")
    right.legend()
    left.set_xscale("log")
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())
    return figure


def _draw_removals(axes: Axes, removed: pd.DataFrame) -> None:
    """A row a part of the model, a tick each step at which a norm of it goes."""
    for row, part in enumerate(_PARTS):
        steps = removed.loc[removed["part"] == part, "step"] + 1
        axes.vlines(steps, row + 0.1, row + 0.9, color=_PART_COLOURS[part], linewidth=1.0 if len(steps) < 16 else 0.4)
    axes.set_ylim(len(_PARTS), 0)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(bottom=False)


def _draw_excess(axes: Axes, excess: pd.DataFrame, sizes: list[str]) -> None:
    colours, number = depth_colours(len(sizes)), EngFormatter(sep="")
    for place, size in enumerate(sizes):
        for n, (_, seed) in enumerate(excess[excess["size"] == size].groupby("seed")):
            line = seed.sort_values("finetuning_tokens")
            parameters = float(f"{line['parameters'].iloc[0]:.3g}")
            label = f"{size} ({number(parameters)})" if n == 0 else None
            style: Style = {"color": colours(place), "markersize": 2.6, "label": label}
            axes.plot(line["finetuning_tokens"], line["excess_nats"], "-o", **style)
    axes.axhline(0, color=QUIET, linewidth=0.6)
    axes.set_xlabel("fine-tuning tokens")
    axes.set_ylabel("loss above the original's (nats)")
    axes.legend(title="size (parameters)", title_fontsize=6.2)


def _draw_reached(axes: Axes, reached: pd.DataFrame, sizes: list[str]) -> None:
    colours = depth_colours(len(sizes))
    for bound, (marker, label) in _BOUNDS.items():
        points = reached[reached["bound"] == bound]
        if len(points):
            of_size = colours([sizes.index(size) for size in points["size"]])
            edge = "none" if bound == "interpolated" else INK
            style: Style = {"s": 16, "marker": marker, "c": of_size, "edgecolors": edge, "linewidths": 0.6, "zorder": 3}
            axes.scatter(points["parameters"], points["tokens"], label=label, **style)
    axes.set_xlabel("parameters without embeddings")


def _line(axes: Axes, losses: pd.Series[float], window: int, colour: str) -> None:
    """``losses`` by step, thin, and their centred running mean."""
    finite = losses.where(np.isfinite(losses))
    axes.plot(finite.index, finite, color=colour, linewidth=0.4, alpha=0.35)
    smooth = finite.rolling(window, center=True, min_periods=window).mean()
    axes.plot(smooth.index, smooth, color=colour, linewidth=1.2)
