"""Does an entropy penalty cure the overload of norm-free models, and at what perplexity? (AERO, Jha & Reagen 2024)"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from normfree.columns import ENTROPY_NATS, ENTROPY_THRESHOLD_NATS, EVAL_PPL
from normfree.errors import InputError
from normfree.report import Callout, Element, Link, Section, Table, paper_style
from normfree.report.frames import THRESHOLDS, check_frame, check_one_setting, in_order
from normfree.report.overload import perplexity_and_overload
from normfree.report.primitives import depth_bar, layer_curves, panel_grid, seeds_note
from normfree.report.style import INK
from normfree.runner import Configuration, Findings, Study, StudyPage, telemetry_frame
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, PAPER, RELU, scale_limits
from normfree.training.objectives import EntropyRegularizationOptions
from normfree.training.objectives.entropy_regularization import PENALTY
from normfree.training.records import METRICS_FILE

WEIGHTS = (0.001, 0.01, 0.1)
OPTIONS = EntropyRegularizationOptions(tolerance=0.2, initial_threshold=0.5)


def penalised(configuration: Configuration, weight: float) -> Configuration:
    """The same model, trained with the penalty."""
    objective = OPTIONS.model_copy(update={"weight": weight}).model_dump()
    return replace(configuration, label=f"{configuration.label}, penalty {weight:g}", objective=objective)


MODELS = tuple((plain, *(penalised(plain, weight) for weight in WEIGHTS)) for plain in (GELU, RELU))
"""Each model without the penalty, then with it at each weight."""


def describe(page: StudyPage) -> Findings:
    """Overload and perplexity by penalty, and whether heads or their thresholds moved."""
    curves, level = _curves(page), page.overload[LAYERNORM_GELU.label]
    sections = [
        Section(
            "Entropy with and without the penalty",
            [
                page.figure(
                    "penalty-weight",
                    perplexity_and_overload(curves, changed="weight of the penalty", level=level),
                    "Perplexity and share of heads in the top quarter of the entropy range (the overload of the paper) "
                    "by the weight of the penalty.",
                ),
                page.head_entropy_figure(),
                page.layer_entropy_figure(),
                page.loss_figure("Evaluation loss over training: plain cross-entropy for all."),
            ],
        ),
    ]
    heads = telemetry_frame(page.results, (ENTROPY_NATS, ENTROPY_THRESHOLD_NATS), ("step", "layer", "head"))
    if len(heads):
        sections.append(Section("Thresholds over training", _threshold_blocks(page, heads)))
    return Findings(_lead(page, curves), sections, scale_limits(page) + _LIMITS)


_CHASE = (
    "A threshold is free to move to its head, and Adam moves it by up to about one learning rate a step, however small "
    "the weight of the penalty is. A penalty that falls while entropies stay says nothing about the heads."
)
_LIMITS = (
    f"One margin ({OPTIONS.tolerance:g} of the maximum) and one initial threshold "
    f"({OPTIONS.initial_threshold:g}) are tried; others may do more or less. The entropy of uniform attention has no "
    "slope, so a head that looks everywhere alike feels the penalty least."
)


def _threshold_blocks(page: StudyPage, heads: pd.DataFrame) -> list[Element]:
    figures: list[Element] = [
        page.figure(
            f"thresholds-{configuration.slug}",
            entropy_threshold_trajectories(
                heads[heads["configuration"] == configuration.label], bound=page.uniform_bound
            ),
            f"{configuration.label}: attention entropy of each head and the threshold it learned, over training, on "
            "training batches. A pair of lines that meet can meet because either of them moved.",
        )
        for _, *penalties in MODELS
        for configuration in penalties
        if configuration.label in set(heads["configuration"])
    ]
    return [*figures, _moves(page, heads), Callout(_CHASE)]


def _moves(page: StudyPage, heads: pd.DataFrame) -> Table:
    """One row a penalised configuration: the penalty, first and last, and how far heads and thresholds went."""
    rows = []
    for label, of_label in heads.groupby("configuration", sort=False):
        # The thresholds of the final weights come without an entropy: no training step reads it there.
        readings = of_label[of_label["step"] < of_label["step"].max()].sort_values(["seed", "layer", "head"])
        first, last = (
            readings.loc[readings["step"] == step, [ENTROPY_NATS, ENTROPY_THRESHOLD_NATS]].to_numpy(dtype=np.float64)
            for step in (readings["step"].min(), readings["step"].max())
        )
        entropy_moved, threshold_moved = np.abs(last - first).mean(axis=0)
        deviation = np.abs(last[:, 0] - last[:, 1])
        is_penalised = np.where(np.isnan(deviation), np.nan, deviation > OPTIONS.tolerance * page.uniform_bound)
        penalty_first, penalty_last = _penalties(page, str(label))
        rows.append(
            {
                "Configuration": label,
                "Penalty, first": penalty_first,
                "Penalty, last": penalty_last,
                "Entropies moved": entropy_moved,
                "Thresholds moved": threshold_moved,
                "Heads penalised at the end": is_penalised.mean(),
            }
        )
    table = pd.DataFrame(rows)
    return Table(
        table,
        "Who moved: mean over heads and seeds, from the first to the last reading on training batches.",
        formats=dict.fromkeys(table.columns[1:5], ".3f") | {"Heads penalised at the end": ".0%"},
        notes=["The penalty is in nats², before its weight; distances are in nats."],
    )


def _penalties(page: StudyPage, label: str) -> tuple[float, float]:
    """The first and the last recorded penalty, mean over seeds."""
    ends = []
    for result in page.results:
        if result.row["configuration"] == label:
            metrics = pd.read_parquet(result.folder / METRICS_FILE)
            values = metrics[metrics["name"] == PENALTY].sort_values("step")["value"]
            ends.append((values.iloc[0], values.iloc[-1]))
    first, last = np.mean(ends, axis=0)
    return float(first), float(last)


def _curves(page: StudyPage) -> pd.DataFrame:
    """One row a model (``line``) and a weight of the penalty (``place``), as ``perplexity_and_overload`` takes them."""
    measured = page.overload
    values = ("none", *(f"{weight:g}" for weight in WEIGHTS))
    return pd.DataFrame(
        {"line": model[0].label, "place": place, "value": value, **measured[each.label]}
        for model in MODELS
        for place, (value, each) in enumerate(zip(values, model, strict=True))
        if each.label in measured
    )


def _lead(page: StudyPage, curves: pd.DataFrame) -> str:
    """Each model's overload and perplexity without the penalty and at each weight."""
    sentences = []
    for model, rows in curves.groupby("line", sort=False):
        readings = [
            f"{row['value']}: {100 * row['top_band']:.0f} %, {row['eval_ppl']:.1f}"
            if np.isfinite(row[EVAL_PPL])
            else f"{row['value']}: diverged"
            for _, row in rows.iterrows()
        ]
        sentences.append(
            f"{model} by the weight of the penalty, heads in the top entropy band and perplexity: "
            f"{'; '.join(readings)}."
        )
    baseline = page.overload[LAYERNORM_GELU.label]
    sentences.append(
        f"{LAYERNORM_GELU.label} has {100 * baseline['top_band']:.0f} % there, and a perplexity of "
        f"{baseline['eval_ppl']:.1f}."
    )
    return " ".join(sentences)


@paper_style()
def entropy_threshold_trajectories(heads: pd.DataFrame, *, bound: float) -> Figure:
    """Attention entropy (solid) and learned threshold (dashed) of every head over training, a panel each layer.

    A head has one colour for both lines, which are means over seeds. Where one of the seeds is NaN there is no line.

    Args:
        heads: columns model, context_length, configuration, seed, step, layer, head, entropy_nats,
            entropy_threshold_nats, of one configuration; entropy may be missing at the last step, as NaN.
        bound: the uniform bound in nats, drawn as a thin line.

    Raises:
        InputError: a column is missing, a head occurs twice at a step, or the frame mixes configurations, models or
            context lengths.
    """
    check_frame(heads, "heads", THRESHOLDS, (ENTROPY_NATS, ENTROPY_THRESHOLD_NATS))
    check_one_setting(heads, "heads")
    if heads["configuration"].nunique() > 1:
        raise InputError("the heads frame has several configurations; select one, since a panel shows a layer")
    layers, numbers = (sorted(in_order(heads[name])) for name in ("layer", "head"))
    figure, grid = panel_grid(len(layers), 6, row_height=1.3, above=0.55, sharex=True, sharey=True)
    lines = {ENTROPY_NATS: "-", ENTROPY_THRESHOLD_NATS: (0, (3, 1.5))}
    for axes, layer in zip(grid.flat, layers, strict=False):
        of_layer = heads[heads["layer"] == layer]
        for name, dashes in lines.items():
            layer_curves(axes, of_layer, name, numbers, by="head", linewidth=0.9, linestyle=dashes)
        axes.axhline(bound, color=INK, linewidth=0.5)
        axes.set_title(f"layer {layer}")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    learned = heads[ENTROPY_THRESHOLD_NATS].dropna()
    grid[0, 0].set_ylim(min([0.0, *learned]), 1.06 * max([bound, *learned]))
    figure.supxlabel("training step" + seeds_note(heads), fontsize=7)
    figure.supylabel("nats", fontsize=7)
    keys = [
        Line2D([], [], color=INK, linewidth=0.9, label="attention entropy"),
        Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (3, 1.5)), label="learned threshold"),
        Line2D([], [], color=INK, linewidth=0.5, label=f"uniform attention, {bound:.2f}"),
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=3, fontsize=6.5)
    depth_bar(figure, grid, numbers, "head")
    return figure


STUDY = Study(
    name="entropy-regularization",
    title="Does a penalty on attention entropy cure the overload of norm-free models?",
    question="Does a penalty on entropy cure overload, and at what perplexity?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: (LAYERNORM_GELU, *(each for model in MODELS for each in model)),
    describe=describe,
    papers=(PAPER, Link("AERO, Jha & Reagen 2024", "https://arxiv.org/abs/2410.13060")),
)
