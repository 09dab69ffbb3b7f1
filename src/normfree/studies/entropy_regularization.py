"""Does an entropy penalty cure the overload of norm-free models, and at what perplexity? (AERO, Jha & Reagen 2024)"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from normfree.report import (
    BANDS,
    Block,
    Callout,
    Section,
    Table,
    entropy_threshold_trajectories,
    evaluation_loss_curves,
    headwise_entropy_heatmaps,
    layerwise_entropy_dynamics,
)
from normfree.studies.frames import eval_curve_frame, head_entropy_frame, layer_entropy_frame, threshold_frame
from normfree.studies.page import Findings, StudyPage
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, RELU, scale_limits
from normfree.studies.study import Configuration, Study
from normfree.training.objectives import EntropyRegularizationOptions
from normfree.training.objectives.entropy_regularization import PENALTY, THRESHOLD
from normfree.training.records import METRICS_FILE

OPTIONS = EntropyRegularizationOptions(weight=0.1, tolerance=0.2, initial_threshold=0.5)


def penalised(configuration: Configuration) -> Configuration:
    """The same model, trained with the penalty."""
    return replace(configuration, label=f"{configuration.label}, penalty", objective=OPTIONS.model_dump())


PAIRS = tuple((plain, penalised(plain)) for plain in (GELU, RELU))


def describe(page: StudyPage) -> Findings:
    """What became of the overload, of perplexity, and who moved: the heads or their thresholds."""
    sections = [
        Section(
            "Entropy with and without the penalty",
            [
                page.figure(
                    "headwise-entropy",
                    headwise_entropy_heatmaps(head_entropy_frame(page.results), maximum=page.uniform_bound),
                    "Attention entropy of every head in nats: final weights, evaluation tokens, one colour scale. The "
                    f"mark on the scale is the entropy of uniform attention, {page.uniform_bound:.3f} nats.",
                ),
                page.figure(
                    "layerwise-entropy",
                    layerwise_entropy_dynamics(layer_entropy_frame(page.results), bound=page.uniform_bound),
                    "Entropy of each layer over training, mean over its heads, on training batches.",
                ),
                page.figure(
                    "evaluation-loss",
                    evaluation_loss_curves(eval_curve_frame(page.results)),
                    "Evaluation loss over training: plain cross-entropy for all.",
                ),
            ],
        ),
    ]
    heads = threshold_frame(page.results)
    if len(heads):
        sections.append(Section("Thresholds over training", _threshold_blocks(page, heads)))
    return Findings(_lead(page), sections, scale_limits(page) + _LIMITS)


_CHASE = (
    "A threshold is free to move to its head, and Adam moves it by up to about one learning rate a step, however small "
    "the weight of the penalty is. A penalty that falls while entropies stay says nothing about the heads."
)
_LIMITS = (
    f"One weight ({OPTIONS.weight:g}), one margin ({OPTIONS.tolerance:g} of the maximum) and one initial threshold "
    f"({OPTIONS.initial_threshold:g}) are tried; others may do more or less. The entropy of uniform attention has no "
    "slope, so a head that looks everywhere alike feels the penalty least."
)


def _threshold_blocks(page: StudyPage, heads: pd.DataFrame) -> list[Block]:
    figures: list[Block] = [
        page.figure(
            f"thresholds-{configuration.slug}",
            entropy_threshold_trajectories(
                heads[heads["configuration"] == configuration.label], bound=page.uniform_bound
            ),
            f"{configuration.label}: attention entropy of each head and the threshold it learned, over training, on "
            "training batches. A pair of lines that meet can meet because either of them moved.",
        )
        for _, configuration in PAIRS
        if configuration.label in set(heads["configuration"])
    ]
    return [*figures, _moves(page, heads), Callout(_CHASE)]


def _moves(page: StudyPage, heads: pd.DataFrame) -> Table:
    """One row a penalised configuration: the penalty, first and last, and how far heads and thresholds went."""
    rows = []
    for label, of_label in heads.groupby("configuration", sort=False):
        # The thresholds of the final weights have no entropy beside them: no training step reads it there.
        readings = of_label[of_label["step"] < of_label["step"].max()].sort_values(["seed", "layer", "head"])
        first, last = (
            readings.loc[readings["step"] == step, ["entropy_nats", THRESHOLD]].to_numpy(dtype=np.float64)
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


def _lead(page: StudyPage) -> str:
    """For each model: its overload and its perplexity with and without the penalty, whatever the numbers are."""
    rows = {str(row["configuration"]): row for row in page.table.to_dict("records")}
    baseline, top = rows[LAYERNORM_GELU.label], BANDS[-1]
    sentences = []
    for plain, penalty in PAIRS:
        pair = [rows[each.label] for each in (plain, penalty) if each.label in rows]
        broken = [str(row["configuration"]) for row in pair if math.isnan(row["eval_ppl"])]
        if broken:
            sentences.append(f"{' and '.join(broken)} diverged, so there is no comparison.")
        elif len(pair) == 2:
            without, having = pair
            if having[top] >= without[top]:
                verdict = "no fewer"
            elif having[top] <= baseline[top]:
                verdict = "no more than with LayerNorm"
            else:
                verdict = "fewer, but more than with LayerNorm"
            change = 100 * (having["eval_ppl"] / without["eval_ppl"] - 1)
            sentences.append(
                f"With the penalty, {100 * having[top]:.0f} % of the heads of {plain.label} are in the top entropy "
                f"band instead of {100 * without[top]:.0f} % ({verdict}), and its perplexity is "
                f"{having['eval_ppl']:.2f} instead of {without['eval_ppl']:.2f} ({change:+.1f} %)."
            )
    sentences.append(
        f"{LAYERNORM_GELU.label} has {100 * baseline[top]:.0f} % there, and a perplexity of {baseline['eval_ppl']:.2f}."
    )
    return " ".join(sentences)


STUDY = Study(
    name="entropy-regularization",
    title="Does a penalty on attention entropy cure the overload of norm-free models?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: (LAYERNORM_GELU, *(each for pair in PAIRS for each in pair)),
    describe=describe,
)
