"""How sparse trained models are, by layer and over training, and what that saves on paper."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from normfree.columns import ACTIVE_SHARE, ATTENDED_KEYS
from normfree.report.frames import SETTING, check_frame, check_one_setting, in_order
from normfree.report.numbers import mean_and_half
from normfree.report.primitives import configuration_curves, integer_axis, legend_above, panel_grid
from normfree.report.style import DASHED, QUIET, configuration_colours, paper_style

SPARSITY = (*SETTING, "configuration", "seed", "layer", ACTIVE_SHARE, ATTENDED_KEYS)
SPARSITY_DYNAMICS = (*SETTING, "configuration", "seed", "step", "tokens", "layer", ACTIVE_SHARE)
SAVINGS = (*SETTING, "configuration", "seed", "flops")
DECODE = (*SETTING, "configuration", "seed", "round", "dense_seconds", "sparse_seconds")

DENSE = 0.995
"""A share of active neurons from which on all are: an activation is zero by rounding now and then."""

_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)
_DASH = "\N{EN DASH}"


@paper_style()
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
    check_frame(sparsity, "sparsity", SPARSITY, (ACTIVE_SHARE, ATTENDED_KEYS))
    check_frame(dynamics, "sparsity dynamics", SPARSITY_DYNAMICS, (ACTIVE_SHARE, "tokens"))
    for frame, name in ((sparsity, "sparsity"), (dynamics, "sparsity dynamics")):
        check_one_setting(frame, name)
    over_layers = dynamics.groupby(["configuration", "seed", "tokens"], sort=False)[ACTIVE_SHARE].agg(_mean)
    lowest_shares = pd.concat([sparsity, dynamics]).groupby("configuration")[ACTIVE_SHARE].min()
    colours = configuration_colours(in_order(sparsity["configuration"]))
    dense = [name for name in colours if lowest_shares[name] >= DENSE]
    drawn = {name: colour for name, colour in colours.items() if name not in dense}
    figure, grid = panel_grid(2, 2, row_height=2.45, sharey=True)
    lowest = 100.0
    for axes, frame, over in zip(grid.flat, (sparsity, over_layers.reset_index()), ("layer", "tokens"), strict=True):
        # zero has no place on a log scale, as when a run's neurons have all died
        percent = frame.assign(percent=100 * frame[ACTIVE_SHARE].where(frame[ACTIVE_SHARE] > 0))
        configuration_curves(axes, percent, "percent", over=over, broken=(ACTIVE_SHARE,), colours=drawn)
        lowest = min([lowest, *percent.loc[percent["configuration"].isin(drawn), "percent"].dropna()])
        if nominal is not None:
            axes.axhline(100 * nominal, zorder=1, **DASHED)
    by_layer, over_training = grid.flat
    by_layer.set_yscale("log")
    by_layer.set_ylim(0.8 * lowest, 125)
    by_layer.yaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if tick >= 0.8 * lowest]))
    by_layer.yaxis.set_minor_locator(NullLocator())
    by_layer.yaxis.set_major_formatter("{x:g}")
    by_layer.set(ylabel="active neurons (%, log)", xlabel="layer", title="After training, evaluation tokens")
    integer_axis(by_layer)
    over_training.set(xlabel="training tokens", title="Over training, mean over layers")
    over_training.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend_above(figure, by_layer)
    if dense:
        figure.supxlabel(f"not drawn, every neuron active: {', '.join(dense)}", fontsize=6.2, color=QUIET)
    return figure


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
    check_frame(sparsity, "sparsity", SPARSITY, (ACTIVE_SHARE, ATTENDED_KEYS))
    check_frame(savings, "savings", SAVINGS, ("flops",))
    for frame, name in ((sparsity, "sparsity"), (savings, "savings")):
        check_one_setting(frame, name)
    key = ["configuration", "seed"]
    speed = pd.Series(dtype="float64")
    if decode is not None:
        check_frame(decode, "decode", DECODE, ("dense_seconds", "sparse_seconds"))
        speed = (decode["dense_seconds"] / decode["sparse_seconds"]).groupby([decode[each] for each in key]).median()
    runs = sparsity.groupby(key, sort=False)[[ACTIVE_SHARE, ATTENDED_KEYS]].agg(_mean)
    dense = savings.loc[savings["configuration"] == baseline, "flops"].mean()
    rows = []
    for configuration in in_order(sparsity["configuration"]):
        of_layers = sparsity[sparsity["configuration"] == configuration]
        shares, keys = (runs.loc[configuration, column] for column in (ACTIVE_SHARE, ATTENDED_KEYS))
        flops = savings.loc[savings["configuration"] == configuration, "flops"]
        layers = 100 * of_layers.groupby("layer")[ACTIVE_SHARE].agg(_mean)
        rows.append(
            {
                "Configuration": configuration,
                "Seeds": len(shares),
                "Active neurons, %": mean_and_half(100 * shares),
                "By layer, %": f"{layers.min():.1f} to {layers.max():.1f}" if layers.notna().all() else "NaN",
                "Keys attended": _DASH if of_layers[ATTENDED_KEYS].isna().all() else mean_and_half(keys),
                "MFLOPs a token": mean_and_half(flops / 1e6),
                "× fewer": mean_and_half(dense / flops),
                "Decode, × as fast": mean_and_half(speed[configuration]) if configuration in speed else _DASH,
            }
        )
    return pd.DataFrame(rows)


def _mean(values: pd.Series) -> float:
    """NaN where one of the values is."""
    return float(values.mean(skipna=False))
