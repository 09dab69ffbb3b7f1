"""Figures of norm removal: the loss while the norms go, and the tokens it takes by model size."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from normfree.errors import InputError
from normfree.report.frames import check_frame, in_order
from normfree.report.norm_removal import NORM_FREE, VANILLA, PowerLaw
from normfree.report.style import INK, QUIET, TWO_COLUMN, depth_colours, paper_style

CURVES = ("configuration", "variant", "step", "loss_nats")
REMOVED = ("configuration", "step", "part", "layer")
EXCESS = ("size", "parameters", "seed", "finetuning_tokens", "excess_nats")
REACHED = ("size", "parameters", "seed", "tokens", "bound")
_VARIANT_COLOURS = {VANILLA: "#0072B2", NORM_FREE: "#D55E00"}
_PARTS = {
    "ffn": "before the FFN",
    "attention_qk": "before Q and K",
    "attention_v": "before V",
    "final": "final norm",
    "end_of_text": "end-of-text",
    "first_token": "first token",
}
_PART_COLOURS = dict(zip(_PARTS, ("#009E73", "#332288", "#CC79A7", "#882255", "#999933", "#44AA99"), strict=True))
_SMOOTHED_STEPS = 40
"""A curve is smoothed over one of that many parts of it: the loss of a single batch is noise."""


def removal_loss_curves(curves: pd.DataFrame, removed: pd.DataFrame) -> Figure:
    """Training loss with the norms kept and going, and below it their difference; ticks above say when a norm
    goes, a row a part.

    Both runs see the same batches, so the difference has little of the batches' noise. Thin: each step; thick: the
    running mean. Losses that are not finite break the lines.

    Args:
        curves: configuration, variant (vanilla, norm-free), step (from 1), loss_nats; one run each.
        removed: configuration, step, part, layer: what goes before which step.

    Raises:
        InputError: a column is missing, or a step of a run occurs twice.
    """
    check_frame(curves, "curves", CURVES, ("loss_nats",))
    check_frame(removed, "removed", REMOVED, ())
    configurations = in_order(curves["configuration"])
    with paper_style():
        figure = Figure(figsize=(min(TWO_COLUMN, 1.6 + 2.0 * len(configurations)), 3.2), layout="constrained")
        grid = figure.subplots(
            3, len(configurations), sharex="col", squeeze=False, height_ratios=(0.5, 1.5, 1), sharey="row"
        )
        for (when, above, below), configuration in zip(grid.T, configurations, strict=True):
            own = curves[curves["configuration"] == configuration]
            losses = own.pivot(index="step", columns="variant", values="loss_nats")
            window = max(1, len(losses) // _SMOOTHED_STEPS)
            shown = [variant for variant in (VANILLA, NORM_FREE) if variant in losses]
            for variant in shown:
                _line(above, losses[variant], window, _VARIANT_COLOURS[variant])
            if len(shown) == 2:
                below.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (4, 2)))
                _line(below, losses[NORM_FREE] - losses[VANILLA], window, INK)
            gone = removed[removed["configuration"] == configuration]
            for row, part in enumerate(_PARTS):
                steps = gone.loc[gone["part"] == part, "step"] + 1
                when.vlines(steps, row + 0.1, row + 0.9, color=_PART_COLOURS[part], linewidth=1.0)
            when.set_ylim(len(_PARTS), 0)
            when.set_yticks([])
            when.grid(visible=False)
            when.spines[["left", "bottom"]].set_visible(False)
            when.tick_params(bottom=False)
            when.set_title(configuration)
            below.set_xlabel("fine-tuning step")
            below.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        grid[0, 0].set_ylabel("removed", rotation=0, ha="right", va="center")
        grid[1, 0].set_ylabel("training loss (nats)")
        grid[2, 0].set_ylabel("norm-free less\nvanilla (nats)")
        lines = {name: Line2D([], [], color=colour) for name, colour in _VARIANT_COLOURS.items()}
        parts = {
            _PARTS[part]: Line2D([], [], color=_PART_COLOURS[part]) for part in _PARTS if part in set(removed["part"])
        }
        figure.legend([*lines.values(), *parts.values()], [*lines, *parts], loc="outside lower center", ncols=4)
    return figure


def removal_scaling(excess: pd.DataFrame, reached: pd.DataFrame, fit: PowerLaw, *, threshold: float) -> Figure:
    """Left, the loss above the original's by budget, a line a size; right, the tokens to the threshold by size.

    On the right a dot is a size and seed, an arrow one that no budget was small or large enough for, and the line the
    power law through the dots.

    Args:
        excess: size, parameters, seed, finetuning_tokens, excess_nats (NaN: diverged).
        reached: size, parameters, seed, tokens, bound (see :class:`~normfree.report.norm_removal.Reached`).
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
    colours, number = depth_colours(len(sizes)), EngFormatter(sep="")
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 2.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for place, size in enumerate(sizes):
            rows = excess[excess["size"] == size]
            for n, (_, seed) in enumerate(rows.groupby("seed")):
                line = seed.sort_values("finetuning_tokens")
                parameters = float(f"{line['parameters'].iloc[0]:.3g}")
                label = f"{size} ({number(parameters)})" if n == 0 else None
                left.plot(
                    line["finetuning_tokens"],
                    line["excess_nats"],
                    "-o",
                    color=colours(place),
                    markersize=2.6,
                    label=label,
                )
        left.axhline(threshold, color=QUIET, linewidth=0.8, linestyle=(0, (4, 2)))
        left.axhline(0, color=QUIET, linewidth=0.6)
        left.set_xlabel("fine-tuning tokens")
        left.set_ylabel("loss above the original's (nats)")
        left.legend(title="size (parameters)", title_fontsize=6.2)
        markers = {"interpolated": "o", "at most": "v", "more than": "^"}
        for bound, marker in markers.items():
            points = reached[reached["bound"] == bound]
            if len(points):
                right.scatter(
                    points["parameters"],
                    points["tokens"],
                    s=16,
                    marker=marker,
                    c=colours([sizes.index(size) for size in points["size"]]),
                    edgecolors="none" if bound == "interpolated" else INK,
                    linewidths=0.6,
                    label={"interpolated": "interpolated", "at most": "at most this", "more than": "more than this"}[
                        bound
                    ],
                    zorder=3,
                )
        if np.isfinite(fit.exponent):
            ends = np.array([reached["parameters"].min(), reached["parameters"].max()], dtype=np.float64)
            interval = f" [{fit.low:.2f}, {fit.high:.2f}]" if np.isfinite(fit.low) else ""
            label = f"tokens ∝ parameters$^{{{fit.exponent:.2f}}}${interval}"
            right.plot(ends, fit.factor * ends**fit.exponent, color=INK, linewidth=1.0, label=label)
        right.set_yscale("log")
        right.set_xlabel("parameters without embeddings")
        right.set_ylabel(f"tokens to within {threshold:g} nats")
        right.legend()
        left.set_xscale("log")
        right.set_xscale("log")
        for axis in (left.xaxis, right.xaxis, right.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(EngFormatter(sep=""))
            axis.set_minor_formatter(NullFormatter())
    return figure


def _line(axes: Axes, losses: pd.Series[float], window: int, colour: str) -> None:
    """``losses`` by step, thin, and their centred running mean."""
    finite = losses.where(np.isfinite(losses))
    axes.plot(finite.index, finite, color=colour, linewidth=0.4, alpha=0.35)
    smooth = finite.rolling(window, center=True, min_periods=window).mean()
    axes.plot(smooth.index, smooth, color=colour, linewidth=1.2)
