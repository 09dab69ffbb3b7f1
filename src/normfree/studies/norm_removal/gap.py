"""What brings a model without norms nearer to the same fine-tuning with norms: order, ramp, constants, loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normfree.columns import EVAL_LOSS
from normfree.files import write_text
from normfree.removal.layout import NORM_FREE, ORIGINAL
from normfree.report import Element, Section, Table
from normfree.report.frames import check_frame, in_order
from normfree.report.intervals import mean_confidence_interval
from normfree.report.numbers import number, plus_minus
from normfree.report.primitives import panel_grid, title_panel
from normfree.report.style import DASHED, INK, QUIET, paper_style
from normfree.runner import Findings, Study, StudyPage
from normfree.studies.norm_removal.removing import DEFAULT, Way, measurement, options, removals_frame
from normfree.studies.norm_removal.study import GPT_2, PAPERS, REMOVALS_FILE, configurations, trained_on
from normfree.studies.norm_removal.tables import at_best_rates

GOAL = 0.02
"""Nats above the control."""
GAPS_FILE = "gaps.csv"
GAPS = ("configuration", "share", "way", "seed", "learning_rate", EVAL_LOSS, "control", "gap_nats")
LOG_RATIO = {"std_loss": "log_ratio", "std_loss_norms": "all"}
RATE_TO_ZERO = {"final_learning_rate_ratio": 0.0}
"""The default ends at half its rate, and its noise is part of the loss that is measured."""
WAYS = (
    DEFAULT,
    Way("costliest first", {"order": "auto"}),
    Way("ramp", ramp_share=0.05),
    Way("median std", {"std_statistic": "median"}),
    Way("log-ratio loss", LOG_RATIO),
    Way("distillation", {"distillation_weight": 1.0}),
    Way("rate to zero", recipe=RATE_TO_ZERO, control=True),
    Way("distillation, costliest first", {"distillation_weight": 1.0, "order": "auto"}),
)
NAMES = {NORM_FREE: "default"}
"""Of ways, where another name is shown."""


def gap_frame(removals: pd.DataFrame, ways: Sequence[Way]) -> pd.DataFrame:
    """The loss of every way above the control of the same seed, each at its best rate, a row a seed.

    The control is the variant with norms whose mean loss over seeds is lowest: the original, or its fine-tuning by any
    recipe. Columns ``GAPS``, nats; NaN where a removal diverged, or is missing for a seed.

    Args:
        removals: see :func:`~normfree.studies.norm_removal.tables.at_best_rates`.
    """
    frames = []
    for _, budget in at_best_rates(removals).groupby(["configuration", "share"], sort=False):
        controls = budget[budget["variant"].isin([ORIGINAL, *(way.control_label for way in ways)])]
        means = controls.groupby("variant")[EVAL_LOSS].agg(lambda losses: losses.mean(skipna=False)).dropna()
        chosen = controls[controls["variant"] == (means.idxmin() if len(means) else None)]
        rows = budget[budget["variant"].isin([way.label for way in ways])].rename(columns={"variant": "way"})
        control = rows["seed"].map(chosen.set_index("seed")[EVAL_LOSS])
        frames.append(rows.assign(control=control, gap_nats=rows[EVAL_LOSS] - control))
    return pd.concat(frames, ignore_index=True)[list(GAPS)]


def gap_table(gaps: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration, budget and way: means over seeds, and differences of the same seed.

    Returns:
        Columns configuration, share, way, seeds, loss, gap and gain (the default's gap less this one's), the latter
        three :class:`~normfree.report.intervals.Estimate` of nats; learning_rate.
    """
    rows: list[dict[str, Any]] = []
    for (configuration, share), budget in gaps.groupby(["configuration", "share"], sort=False):
        default = budget[budget["way"] == NORM_FREE].set_index("seed")["gap_nats"]
        for way in in_order(budget["way"]):
            own = budget[budget["way"] == way].set_index("seed")
            values = {"loss": own[EVAL_LOSS], "gap": own["gap_nats"], "gain": default - own["gap_nats"]}
            estimates = {name: mean_confidence_interval(each.to_numpy(np.float64)) for name, each in values.items()}
            key = {"configuration": configuration, "share": share, "way": way, "seeds": len(own)}
            rows.append({**key, **estimates, "learning_rate": own["learning_rate"].iloc[0]})
    return pd.DataFrame(rows)


def formatted_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`gap_table` for readers."""
    return pd.DataFrame(
        {
            "Configuration": row["configuration"],
            "Budget": f"{100 * row['share']:g} %",
            "Way": NAMES.get(row["way"], row["way"]),
            "Seeds": str(row["seeds"]),
            "Loss": plus_minus(row["loss"], ".4f"),
            "Norm-free − control": plus_minus(row["gap"], "+.4f"),
            "Closed": "" if row["way"] == NORM_FREE else plus_minus(row["gain"], "+.4f"),
            "Rate": number(row["learning_rate"], "g"),
        }
        for row in table.to_dict("records")
    )


@paper_style()
def gap_by_way(gaps: pd.DataFrame, *, goal: float) -> Figure:
    """Loss above the control by way, a panel a configuration: dots are seeds, bars the 95 % t-interval of their mean.

    Args:
        gaps: configuration, way, seed, gap_nats, of one budget.
        goal: in nats, a dashed line.

    Raises:
        InputError: a column is missing, or a seed occurs twice.
    """
    check_frame(gaps, "gaps", ("configuration", "way", "seed", "gap_nats"), ("gap_nats",))
    names, ways = in_order(gaps["configuration"]), in_order(gaps["way"])
    figure, grid = panel_grid(len(names), 3, row_height=0.7 + 0.2 * len(ways), sharey=True)
    for axes, name in zip(grid.flat, names, strict=False):
        own = gaps[gaps["configuration"] == name]
        for place, way in enumerate(ways):
            _draw_seeds(axes, place, own.loc[own["way"] == way, "gap_nats"].to_numpy(np.float64))
        axes.axvline(0, color=QUIET, linewidth=0.6)
        axes.axvline(goal, **DASHED)
        title_panel(axes, name)
    first = grid.flat[0]
    first.set_yticks(range(len(ways)), [NAMES.get(way, way) for way in ways])
    first.set_ylim(len(ways) - 0.5, -0.5)
    figure.supxlabel("norm-free less control (nats)", fontsize=7)
    return figure


def _draw_seeds(axes: Axes, place: int, values: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    if not len(values) or not np.isfinite(values).all():
        axes.text(0, place, " diverged or missing", va="center", color=QUIET, fontsize=5.5)
        return
    found = mean_confidence_interval(values)
    if np.isfinite(found.low):
        axes.plot([found.low, found.high], [place, place], color=INK, linewidth=1.0)
    axes.plot(found.mean, place, "|", color=INK, markersize=7)
    axes.scatter(values, np.full(len(values), place), s=9, color="#D55E00", alpha=0.8, linewidths=0, zorder=3)


def describe(page: StudyPage) -> Findings:
    """The gap by way, and which ways close it."""
    removals = removals_frame(page.results, options(page.folder.preset), *WAYS)
    write_text(page.path / REMOVALS_FILE, removals.to_csv(index=False, na_rep="nan"))
    limits = trained_on(page) + _LIMITS
    if removals.empty:
        return Findings("No norm has been removed yet.", [], limits)
    gaps = gap_frame(removals, WAYS)
    write_text(page.path / GAPS_FILE, gaps.to_csv(index=False, na_rep="nan"))
    table = gap_table(gaps)
    shown = gaps[gaps["share"] == gaps["share"].max()].drop(columns="share")
    figure = page.figure(
        "removal-gap",
        gap_by_way(shown, goal=GOAL),
        "Norm-free evaluation loss less the control's of the same seed, at the largest budget. Dots: seeds; "
        f"bars: 95 % t-interval of their mean; dashed: the goal, {GOAL:g} nats.",
    )
    text = "Evaluation loss in nats per token, each way at its own best learning rate."
    blocks: list[Element] = [figure, Table(formatted_gaps(table), text, notes=_NOTES)]
    return Findings(_lead(table), [Section("The gap by way", blocks)], limits)


_NOTES = (
    "± is half of a 95 % t-interval over seeds; differences are those of the same seed.",
    "Control: the model with norms whose mean loss is lowest, of the original and its fine-tunings.",
    "Closed: the default's gap less that of this way. NaN: a removal diverged, or is missing for a seed.",
)
_LIMITS = (
    " Each way has one setting that was not tuned; learning rates, decay of the control and ways are compared on the "
    "losses that are shown."
)


def _lead(table: pd.DataFrame) -> str:
    """The smallest gap of each configuration and budget, and whether it reaches the goal."""
    sentences = []
    for (configuration, _), rows in table.groupby(["configuration", "share"], sort=False):
        budget = f"{configuration}, {100 * rows['share'].iloc[0]:g} % of the training tokens"
        finite = rows[[np.isfinite(each.mean) for each in rows["gap"]]]
        if finite.empty:
            sentences.append(f"{budget}: every removal diverged or is missing.")
            continue
        best = min(finite.to_dict("records"), key=lambda row: float(row["gap"].mean))
        gap, way = best["gap"], NAMES.get(best["way"], best["way"])
        is_within = "within" if gap.mean <= GOAL else "not within"
        sentences.append(
            f"{budget}: {plus_minus(gap, '+.4f')} nats to the control by {way}, {is_within} the goal of {GOAL:g}."
        )
    return " ".join(sentences)


STUDY = Study(
    name="norm-removal-gap",
    title="What closes the gap of models without norms",
    question="Which changes of the removal bring a norm-free model nearest to its control?",
    presets=("removal-gap-smoke", "removal-gap-cpu", "removal-cpu"),
    baseline=GPT_2.label,
    configurations=configurations,
    describe=describe,
    measurement=measurement(configurations, *WAYS),
    papers=PAPERS,
)
