"""How sparse trained models are, by layer and over training, and what that saves on paper."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

from normfree.report.frames import SETTING, check_frame, check_one_setting, in_order
from normfree.report.numbers import mean_and_half
from normfree.report.style import INK, QUIET, TWO_COLUMN, configuration_colours, paper_style

SPARSITY = (*SETTING, "configuration", "seed", "layer", "active_share", "attended_keys")
SPARSITY_DYNAMICS = (*SETTING, "configuration", "seed", "step", "tokens", "layer", "active_share")
SAVINGS = (*SETTING, "configuration", "seed", "flops")
DECODE = (*SETTING, "configuration", "seed", "round", "dense_seconds", "sparse_seconds")

DENSE = 0.995
"""A share of active neurons from which on all are: an activation is zero by rounding now and then."""

_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)
_DASH = "\N{EN DASH}"


def active_neurons(sparsity: pd.DataFrame, dynamics: pd.DataFrame, *, nominal: float | None = None) -> Figure:
    """Active neurons in percent (log scale): by layer when training has ended, and over training, mean over layers.

    With several seeds a line is their mean, and the band their range. A diverged run ends its configuration's line.
    Configurations that use every neuron all the time, as GELU does, are named below instead of drawn.

    Args:
        sparsity: columns model, context_length, configuration, seed, layer, active_share, attended_keys; one row a run
            and layer.
        dynamics: columns model, context_length, configuration, seed, step, tokens, layer, active_share; one row a run,
            step and layer.
        nominal: the share that top-k aims at, 0 to 1, drawn as a dashed line.

    Raises:
        InputError: a column is missing, a layer occurs twice, or a frame mixes models or context lengths.
    """
    check_frame(sparsity, "sparsity", SPARSITY, ("active_share", "attended_keys"))
    check_frame(dynamics, "sparsity dynamics", SPARSITY_DYNAMICS, ("active_share", "tokens"))
    for frame, name in ((sparsity, "sparsity"), (dynamics, "sparsity dynamics")):
        check_one_setting(frame, name)
    key = ["configuration", "seed", "tokens"]
    over_layers = dynamics.groupby(key, sort=False)["active_share"].agg(_mean).reset_index()
    colours = configuration_colours(in_order(sparsity["configuration"]))
    lowest_shares = pd.concat([sparsity, dynamics]).groupby("configuration")["active_share"].min()
    dense = [name for name in colours if lowest_shares[name] >= DENSE]
    drawn = {name: colour for name, colour in colours.items() if name not in dense}
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 2.45), layout="constrained")
        by_layer, over_training = figure.subplots(1, 2, sharey=True)
        lowest = 100.0
        for axes, frame, x in ((by_layer, sparsity, "layer"), (over_training, over_layers, "tokens")):
            for name, colour in drawn.items():
                lowest = min(lowest, _draw(axes, frame[frame["configuration"] == name], x, colour, name))
            if nominal is not None:
                axes.axhline(100 * nominal, color=INK, linewidth=0.7, linestyle=(0, (3, 1.5)), zorder=1)
        by_layer.set_yscale("log")
        by_layer.set_ylim(0.8 * lowest, 125)
        by_layer.yaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if tick >= 0.8 * lowest]))
        by_layer.yaxis.set_minor_locator(NullLocator())
        by_layer.yaxis.set_major_formatter("{x:g}")
        by_layer.set_ylabel("active neurons (%, log scale)")
        by_layer.set_xlabel("layer")
        by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
        over_training.set_xlabel("training tokens")
        over_training.xaxis.set_major_formatter(EngFormatter(sep=""))
        by_layer.set_title("After training, evaluation tokens")
        over_training.set_title("Over training, mean over layers")
        handles, labels = by_layer.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), handlelength=1.6)
        if dense:
            figure.supxlabel(f"not drawn, every neuron active: {', '.join(dense)}", fontsize=6.2, color=QUIET)
    return figure


def _draw(axes: Axes, runs: pd.DataFrame, x: str, colour: str, label: str) -> float:
    """One line; returns its lowest value in percent, or 100 if it has none."""
    shares = 100 * runs.pivot(index=x, columns="seed", values="active_share")
    # zero has no place on a log scale, as when a run's neurons have all died
    shares = shares.where(shares > 0)
    marker: dict[str, Any] = {"marker": "o", "markersize": 2.5} if x == "layer" else {}
    axes.plot(shares.index, shares.mean(axis=1, skipna=False), color=colour, label=label, **marker)
    if shares.shape[1] > 1:
        axes.fill_between(shares.index, shares.min(axis=1), shares.max(axis=1), color=colour, alpha=0.2, lw=0)
    low = float(shares.min().min())
    return low if np.isfinite(low) else 100.0


def sparsity_table(
    sparsity: pd.DataFrame, savings: pd.DataFrame, decode: pd.DataFrame | None = None, *, baseline: str
) -> pd.DataFrame:
    """Active neurons, attended keys, FLOPs per token and speed of decode: ``mean ± half`` of a 95 % t-interval.

    Args:
        sparsity: the columns ``SPARSITY``, one row a run and layer; ``attended_keys`` is NaN for softmax attention.
        savings: the columns ``SAVINGS``, one row a run: FLOPs per token on paper, for the sparsity measured.
        decode: the columns ``DECODE``, one row a round of a run that decodes sparsely: what a token takes, and one of
            the dense model.
        baseline: the configuration whose FLOPs the others are compared with.

    Raises:
        InputError: a column is missing, a row occurs twice, or a frame mixes models or context lengths.
    """
    check_frame(sparsity, "sparsity", SPARSITY, ("active_share", "attended_keys"))
    check_frame(savings, "savings", SAVINGS, ("flops",))
    for frame, name in ((sparsity, "sparsity"), (savings, "savings")):
        check_one_setting(frame, name)
    key = ["configuration", "seed"]
    speed = pd.Series(dtype="float64")
    if decode is not None:
        check_frame(decode, "decode", DECODE, ("dense_seconds", "sparse_seconds"))
        speed = (decode["dense_seconds"] / decode["sparse_seconds"]).groupby([decode[each] for each in key]).median()
    runs = sparsity.groupby(key, sort=False)[["active_share", "attended_keys"]].agg(_mean)
    dense = savings.loc[savings["configuration"] == baseline, "flops"].mean()
    rows = []
    for configuration in in_order(sparsity["configuration"]):
        of_layers = sparsity[sparsity["configuration"] == configuration]
        shares, keys = (runs.loc[configuration, column] for column in ("active_share", "attended_keys"))
        flops = savings.loc[savings["configuration"] == configuration, "flops"]
        layers = 100 * of_layers.groupby("layer")["active_share"].agg(_mean)
        rows.append(
            {
                "Configuration": configuration,
                "Seeds": len(shares),
                "Active neurons, %": mean_and_half(100 * shares),
                "By layer, %": f"{layers.min():.1f} to {layers.max():.1f}" if layers.notna().all() else "NaN",
                "Keys attended": _DASH if of_layers["attended_keys"].isna().all() else mean_and_half(keys),
                "MFLOPs a token": mean_and_half(flops / 1e6),
                "× fewer": mean_and_half(dense / flops),
                "Decode, × as fast": mean_and_half(speed[configuration]) if configuration in speed else _DASH,
            }
        )
    return pd.DataFrame(rows)


def _mean(values: pd.Series) -> float:
    """NaN where one of the values is."""
    return float(values.mean(skipna=False))
