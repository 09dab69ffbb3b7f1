"""Figures of costs under secure computation."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter
from numpy.typing import NDArray

from normfree.report.frames import check_frame, in_order
from normfree.report.style import INK, QUIET, TWO_COLUMN, configuration_colours, paper_style

GROUP_COSTS = ("model", "protocol", "group", "bytes_sent", "messages_sent")
PARETO = ("model", "protocol", "bytes_sent", "eval_ppl")
ALTERNATIVES = ("protocol", "group", "label", "bytes_sent")

# Paul Tol's "light" colours, as the page also has the colours of configurations.
_GROUP_COLOURS = {
    "linear": "#77AADD",
    "attention products": "#99DDFF",
    "softmax": "#44BB99",
    "norm": "#EE8866",
    "activation": "#EEDD88",
    "other": "#DDDDDD",
}
_PROTOCOL_COLOURS = ("#332288", "#44AA99", "#CC6677")
_MEGABYTE = 1e6


def cost_by_operation(costs: pd.DataFrame) -> Figure:
    """What a party sends for each model, as a bar of operations: megabytes above, messages below; a panel a protocol.

    Args:
        costs: model, protocol, group (of ``GROUPS``), bytes_sent and messages_sent (means over the parties).

    Raises:
        InputError: a column is missing, or a group of a model occurs twice.
    """
    check_frame(costs, "costs", GROUP_COSTS, ("bytes_sent", "messages_sent"))
    models, protocols = in_order(costs["model"]), in_order(costs["protocol"])
    groups = [group for group in _GROUP_COLOURS if group in set(costs["group"])]
    rows = {"bytes_sent": ("sent by a party (MB)", _MEGABYTE), "messages_sent": ("messages sent by a party", 1.0)}
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMN, 1.3 + 0.42 * len(models)), layout="constrained")
        grid: NDArray[Any] = figure.subplots(2, len(protocols), sharex="row", sharey=True, squeeze=False)
        for panels, (column, (label, unit)) in zip(grid, rows.items(), strict=True):
            for axes, protocol in zip(panels, protocols, strict=True):
                table = costs[costs["protocol"] == protocol].pivot(index="model", columns="group", values=column)
                _stack(axes, table.reindex(index=models, columns=groups).fillna(0.0) / unit)
                axes.set_xlabel(label)
                axes.xaxis.set_major_locator(MaxNLocator(5))
        for axes, protocol in zip(grid[0], protocols, strict=True):
            axes.set_title(protocol)
        grid[0, 0].invert_yaxis()
        figure.legend(
            handles=[Patch(color=_GROUP_COLOURS[group], label=group) for group in groups],
            loc="outside upper center",
            ncols=len(groups),
            handlelength=1.0,
            handleheight=0.8,
            columnspacing=1.2,
        )
    return figure


def _stack(axes: Axes, sizes: pd.DataFrame) -> None:
    """One bar for each row of ``sizes``, followed by its sum."""
    left = np.zeros(len(sizes))
    for group in sizes.columns:
        widths = sizes[group].to_numpy(dtype=np.float64)
        axes.barh(range(len(sizes)), widths, 0.72, left=left, color=_GROUP_COLOURS[str(group)])
        left += widths
    for row, total in enumerate(left):
        axes.annotate(
            f"{total:,.{0 if total >= 100 else 1}f}",
            (total, row),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            fontsize=5.8,
        )
    axes.set_yticks(range(len(sizes)), sizes.index)
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.16 * float(left.max())))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def perplexity_against_bytes(points: pd.DataFrame) -> Figure:
    """Perplexity over what a party sends, a panel a protocol.

    The dashed line joins the models that no other beats in both.

    Args:
        points: model, protocol, bytes_sent (mean over the parties), eval_ppl; a model without a perplexity is left out.

    Raises:
        InputError: a column is missing, or a model occurs twice in a protocol.
    """
    check_frame(points, "points", PARETO, ("bytes_sent", "eval_ppl"))
    colours = configuration_colours(in_order(points["model"]))
    shown = points[np.isfinite(points["eval_ppl"])]
    protocols = in_order(points["protocol"])
    with paper_style():
        width = min(TWO_COLUMN, 0.9 + 3.0 * len(protocols))
        figure = Figure(figsize=(width, 2.3), layout="constrained")
        panels = figure.subplots(1, len(protocols), sharex=True, sharey=True, squeeze=False)
        middle = (shown["bytes_sent"].min() + shown["bytes_sent"].max()) / 2
        for axes, protocol in zip(panels.flat, protocols, strict=True):
            rows = shown[shown["protocol"] == protocol]
            front = pareto_front(rows)
            axes.plot(
                front["bytes_sent"] / _MEGABYTE,
                front["eval_ppl"],
                color=QUIET,
                linewidth=0.8,
                linestyle=(0, (4, 2)),
                zorder=1,
            )
            for row in rows.to_dict("records"):
                place = (row["bytes_sent"] / _MEGABYTE, row["eval_ppl"])
                axes.plot(*place, "o", color=colours[row["model"]], markersize=5, zorder=2)
                is_left = row["bytes_sent"] <= middle
                axes.annotate(
                    row["model"],
                    place,
                    xytext=(6 if is_left else -6, 0),
                    textcoords="offset points",
                    ha="left" if is_left else "right",
                    va="center",
                    fontsize=6.2,
                )
            axes.set_title(protocol)
            axes.set_xlabel("sent by a party (MB)")
            axes.margins(0.1, 0.12)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        panels[0, 0].set_ylabel("perplexity")
    return figure


def pareto_front(points: pd.DataFrame) -> pd.DataFrame:
    """The rows with finite bytes_sent and eval_ppl that no other row beats in one and equals in the other, by bytes."""
    ordered = points.dropna(subset=["bytes_sent", "eval_ppl"]).sort_values(["bytes_sent", "eval_ppl"])
    best = ordered["eval_ppl"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["eval_ppl"] < best]


def alternatives_bytes(alternatives: pd.DataFrame) -> Figure:
    """What a party sends for every norm and every activation on the same arrays, logarithmic, a panel a group.

    Args:
        alternatives: protocol, group (``norm`` or ``activation``), label, bytes_sent (mean over the parties).

    Raises:
        InputError: a column is missing, or a label occurs twice in a protocol.
    """
    check_frame(alternatives, "alternatives", ALTERNATIVES, ("bytes_sent",))
    protocols, groups = in_order(alternatives["protocol"]), in_order(alternatives["group"])
    labels = {group: in_order(alternatives.loc[alternatives["group"] == group, "label"]) for group in groups}
    with paper_style():
        rows = max(len(each) for each in labels.values())
        height = 0.9 + max(0.2, 0.13 * len(protocols)) * rows
        figure = Figure(figsize=(TWO_COLUMN, height), layout="constrained")
        megabytes = alternatives["bytes_sent"] / _MEGABYTE
        limits = (megabytes.min() / 2, 2.5 * megabytes.max())
        panels: NDArray[Any] = figure.subplots(1, len(groups), sharex=True, squeeze=False)
        for axes, group in zip(panels.flat, groups, strict=True):
            of_group = alternatives[alternatives["group"] == group]
            _grouped_bars(axes, of_group, labels[group], protocols)
            axes.set_xlim(*limits)
            axes.set_title(f"{group}s")
            axes.set_xlabel("sent by a party (MB, log scale)")
        figure.legend(
            handles=[Patch(color=_PROTOCOL_COLOURS[i], label=name) for i, name in enumerate(protocols)],
            loc="outside upper center",
            ncols=len(protocols),
            handlelength=1.0,
            handleheight=0.8,
        )
    return figure


def _grouped_bars(axes: Axes, rows: pd.DataFrame, labels: list[str], protocols: list[str]) -> None:
    axes.set_xscale("log")
    height = 0.76 / len(protocols)
    for i, protocol in enumerate(protocols):
        values = rows[rows["protocol"] == protocol].set_index("label")["bytes_sent"].reindex(labels) / _MEGABYTE
        places = np.arange(len(labels)) + (i - (len(protocols) - 1) / 2) * height
        axes.barh(places, values, 0.92 * height, color=_PROTOCOL_COLOURS[i])
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.3g}",
                (value, place),
                xytext=(2, 0),
                textcoords="offset points",
                va="center",
                fontsize=5.4,
                color=INK,
            )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
