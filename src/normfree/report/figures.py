"""Figures of a study over time and over heads (ReLU's Revival, Figures 2 and 4), and saving them."""

import re
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from normfree.errors import InputError
from normfree.files import written_whole
from normfree.report.frames import (
    EVAL_CURVE,
    HEAD_ENTROPY,
    LAYER_ENTROPY,
    check_frame,
    check_one_setting,
    in_order,
)
from normfree.report.statistics import BAND_LABELS, BANDS, band_shares, mean_confidence_interval
from normfree.report.style import (
    INK,
    NON_FINITE,
    ONE_COLUMN,
    TWO_COLUMN,
    configuration_colours,
    depth_bar,
    depth_colours,
    hide_unused_panels,
    paper_style,
)


def headwise_entropy_distribution(head_entropy: pd.DataFrame) -> Figure:
    """Share of heads in each quarter of the entropy range, bars by configuration (ReLU's Revival, Figure 2a).

    "max" is taken over the heads of all configurations (see :func:`normfree.report.band_shares`). With
    several seeds a bar is the mean, dots are the seeds and whiskers the 95 % t-interval. A diverged run makes
    its configuration's bars NaN, written in their place.

    Args:
        head_entropy: columns model, context_length, configuration, seed, layer, head, entropy_nats.

    Raises:
        InputError: a column is missing, a head occurs twice, or the frame mixes models or context lengths.
    """
    check_frame(head_entropy, "head_entropy", HEAD_ENTROPY, ("entropy_nats",))
    check_one_setting(head_entropy, "head_entropy")
    shares = band_shares(head_entropy)
    configurations = in_order(shares["configuration"])
    colours = configuration_colours(configurations)
    several = bool((shares.groupby("configuration").size() > 1).any())
    with paper_style():
        wide = len(configurations) > 4
        figure = Figure(figsize=(TWO_COLUMN if wide else ONE_COLUMN, 2.25), layout="constrained")
        axes = figure.subplots()
        bar_width = 0.84 / len(configurations)
        for i, configuration in enumerate(configurations):
            runs = 100 * shares.loc[shares["configuration"] == configuration, list(BANDS)].to_numpy(dtype=np.float64)
            places = np.arange(len(BANDS)) + (i - (len(configurations) - 1) / 2) * bar_width
            _draw_bars(axes, places, runs, 0.92 * bar_width, colours[configuration], configuration)
        axes.set_xticks(range(len(BANDS)), BAND_LABELS, fontsize=5.6)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(
            "attention entropy of a head" + ("\n(dots: seeds, whiskers: 95 % interval of the mean)" if several else "")
        )
        axes.set_ylabel("share of heads (%)")
        axes.set_ylim(0, min(axes.get_ylim()[1] * 1.04, 118))
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(len(configurations), 4),
            handlelength=1.0,
            handleheight=0.8,
            columnspacing=1.2,
        )
    return figure


def _draw_bars(axes: Axes, places: np.ndarray, runs: np.ndarray, width: float, colour: str, configuration: str) -> None:
    """``runs`` is [n_seeds, 4], percent."""
    estimates = [mean_confidence_interval(runs[:, band]) for band in range(runs.shape[1])]
    axes.bar(places, [e.mean for e in estimates], width, color=colour, label=configuration)
    for place, estimate, values in zip(places, estimates, runs.T, strict=True):
        if np.isnan(estimate.mean):
            axes.annotate(
                "NaN",
                (place, 0),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                rotation=90,
                fontsize=5.5,
                color=colour,
                fontweight="bold",
            )
            continue
        top = estimate.mean
        if estimate.n > 1:
            low, high = max(estimate.low, 0.0), min(estimate.high, 100.0)
            axes.plot([place, place], [low, high], color=INK, linewidth=0.8)
            axes.plot(
                [place] * len(values),
                values,
                "o",
                color="white",
                markersize=2,
                markeredgecolor=INK,
                markeredgewidth=0.4,
            )
            top = max(high, *values)
        axes.annotate(
            f"{estimate.mean:.0f}",
            (place, top),
            xytext=(0, 1.5),
            textcoords="offset points",
            ha="center",
            fontsize=5.2,
            color=INK,
        )


LONGEST_LEGEND = 5
"""Configurations whose legend fits into the corner of the loss curves."""


def evaluation_loss_curves(eval_curve: pd.DataFrame) -> Figure:
    """Evaluation loss over training tokens, a line per configuration (ReLU's Revival, Figure 2b).

    With several seeds the line is their mean and the band their range. A mean ends where one of the seeds
    does; the others go on as thin lines. A run whose loss stops being finite ends in a cross.

    The loss axis shows all that happens after the first tenth of the training tokens and cuts off the steep
    start.

    Args:
        eval_curve: columns model, context_length, configuration, seed, step, tokens, eval_loss (nats per token).

    Raises:
        InputError: a column is missing, an evaluation occurs twice, or the frame mixes models or context
            lengths.
    """
    check_frame(eval_curve, "eval_curve", EVAL_CURVE, ("eval_loss", "tokens"))
    check_one_setting(eval_curve, "eval_curve")
    configurations = in_order(eval_curve["configuration"])
    colours = configuration_colours(configurations)
    with paper_style():
        # a legend of many lines would lie over them
        is_long = len(configurations) > LONGEST_LEGEND
        figure = Figure(figsize=(TWO_COLUMN if is_long else ONE_COLUMN, 2.25), layout="constrained")
        axes = figure.subplots()
        bottom, top = _loss_limits(eval_curve)
        several = False
        for configuration in configurations:
            runs = eval_curve[eval_curve["configuration"] == configuration]
            losses = runs.pivot(index="tokens", columns="seed", values="eval_loss")
            losses = losses.where(np.isfinite(losses))
            several |= losses.shape[1] > 1
            n_diverged = _draw_runs(axes, runs, colours[configuration], top, thin=losses.shape[1] > 1)
            label = configuration
            if n_diverged:
                label += f" ({n_diverged} of {losses.shape[1]} diverged)" if losses.shape[1] > 1 else " (diverged)"
            mean = losses.mean(axis=1, skipna=False)
            axes.plot(losses.index, mean, color=colours[configuration], label=label)
            if losses.shape[1] > 1:
                whole = losses.dropna()
                axes.fill_between(
                    whole.index,
                    whole.min(axis=1),
                    whole.max(axis=1),
                    color=colours[configuration],
                    alpha=0.2,
                    lw=0,
                )
        axes.set_ylim(bottom, top)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("training tokens" + (" (line: mean, band: range over seeds)" if several else ""))
        axes.set_ylabel("evaluation loss (nats per token)")
        if is_long:
            figure.legend(loc="outside right upper", handlelength=1.6, ncols=1 + len(configurations) // 12)
        else:
            axes.legend(loc="upper right", handlelength=1.6)
    return figure


def _loss_limits(eval_curve: pd.DataFrame) -> tuple[float, float]:
    """Up to the largest loss after the first tenth of training, but no more than at the first evaluations.

    Diverged runs do not stretch the axis, unless there are no others: their last losses can be of any size.
    """
    runs = [run for _, run in eval_curve.groupby(["configuration", "seed"])]
    steady = [run for run in runs if np.isfinite(run["eval_loss"]).all()]
    shown = pd.concat(steady or runs)
    finite = shown[np.isfinite(shown["eval_loss"])]
    if finite.empty:
        return 0.0, 1.0
    later = finite[finite["tokens"] >= 0.1 * eval_curve["tokens"].max()]
    first = finite.loc[finite.groupby(["configuration", "seed"])["tokens"].idxmin(), "eval_loss"].max()
    low, high = float(finite["eval_loss"].min()), min(float(later["eval_loss"].max()), float(first))
    if later.empty or high <= low:
        high = float(first) if first > low else low + 1.0
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _draw_runs(axes: Axes, runs: pd.DataFrame, colour: str, top: float, *, thin: bool) -> int:
    """Draws the crosses of diverged runs, and each run as a thin line if asked; returns how many diverged."""
    n_diverged = 0
    for _, run in runs.sort_values("tokens").groupby("seed"):
        finite = run[np.isfinite(run["eval_loss"])]
        if thin:
            axes.plot(finite["tokens"], finite["eval_loss"], color=colour, linewidth=0.5, alpha=0.6)
        if len(finite) == len(run):
            continue
        n_diverged += 1
        if len(finite):
            end = (float(finite["tokens"].iloc[-1]), min(float(finite["eval_loss"].iloc[-1]), top))
            axes.plot(
                *end,
                "X",
                color=colour,
                markersize=6,
                markeredgecolor="white",
                markeredgewidth=0.6,
                clip_on=False,
            )
    return n_diverged


def layerwise_entropy_dynamics(layer_entropy: pd.DataFrame, *, bound: float | None = None) -> Figure:
    """Attention entropy of each layer over training, a panel each configuration (ReLU's Revival, Figure 4).

    Lines go from light (first layer) to dark (last) and are means over seeds. From the step where a layer
    stops being finite in one of the seeds, the panel is hatched.

    Args:
        layer_entropy: columns model, context_length, configuration, seed, step, layer, entropy_nats.
        bound: the uniform bound in nats, drawn as a dashed line.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, or the frame mixes models or context
            lengths.
    """
    check_frame(layer_entropy, "layer_entropy", LAYER_ENTROPY, ("entropy_nats",))
    check_one_setting(layer_entropy, "layer_entropy")
    configurations = in_order(layer_entropy["configuration"])
    layers = sorted(in_order(layer_entropy["layer"]))
    colours = depth_colours(len(layers))
    n_columns = min(len(configurations), 4)
    n_rows = ceil(len(configurations) / n_columns)
    n_seeds = layer_entropy.groupby("configuration")["seed"].nunique().max()
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 0.35 + 1.55 * n_rows), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
        for axes, configuration in zip(grid.flat, configurations, strict=False):
            runs = layer_entropy[layer_entropy["configuration"] == configuration]
            _draw_layers(axes, runs, [colours(i) for i in range(len(layers))], layers)
            axes.set_title(configuration)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            if bound is not None:
                axes.axhline(bound, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1.5)
        hide_unused_panels(grid, len(configurations))
        finite = layer_entropy["entropy_nats"][np.isfinite(layer_entropy["entropy_nats"])]
        grid[0, 0].set_ylim(0, 1.06 * max(finite.max() if len(finite) else 0.0, bound or 0.0) or 1.0)
        if bound is not None:
            grid[0, 0].annotate(
                f"uniform {bound:.2f}",
                (1, bound),
                xytext=(-1, -2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=5.8,
                color=INK,
            )
        figure.supxlabel("training step" + (f" (mean over {n_seeds} seeds)" if n_seeds > 1 else ""), fontsize=7)
        figure.supylabel("attention entropy (nats)", fontsize=7)
        depth_bar(figure, grid, colours, layers, "layer")
    return figure


def _draw_layers(axes: Axes, runs: pd.DataFrame, colours: Sequence[tuple[float, ...]], layers: Sequence[int]) -> None:
    for layer, colour in zip(layers, colours, strict=True):
        entropy = runs[runs["layer"] == layer].pivot(index="step", columns="seed", values="entropy_nats")
        mean = entropy.where(np.isfinite(entropy)).mean(axis=1, skipna=False)
        axes.plot(mean.index, mean, color=colour, linewidth=1.0)
    broken = runs.loc[~np.isfinite(runs["entropy_nats"]), "step"]
    if len(broken):
        axes.axvspan(broken.min(), runs["step"].max(), **NON_FINITE)
        n_seeds = runs.loc[~np.isfinite(runs["entropy_nats"]), "seed"].nunique()
        axes.text(
            0.97,
            0.05,
            f"NaN in {n_seeds} of {runs['seed'].nunique()} runs\nfrom step {broken.min():,}",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=5.8,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        )


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes ``name.png`` (200 dpi) and ``name.pdf`` (TrueType fonts) into ``folder``, made if need be.

    The files hold no dates, so the same data give the same bytes.

    Raises:
        InputError: ``name`` is not a plain file name without ending (letters, digits, ``_``, ``+``, ``.`` and
            ``-``).
    """
    if not re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9_+.-]*", name):
        raise InputError(f"figure name {name!r} is not a plain file name; use letters, digits, '_', '+', '.' and '-'")
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
    paths = []
    with paper_style():
        for ending, fields in metadata.items():
            path = folder / f"{name}.{ending}"
            with written_whole(path) as temporary:
                figure.savefig(temporary, format=ending, metadata=fields)
            paths.append(path)
    return paths
