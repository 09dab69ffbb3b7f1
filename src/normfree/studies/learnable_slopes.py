"""Learnable negative slopes without LayerNorm (ReLU's Revival, Section 3, Figures 3 and 4), with the paper's controls.

The paper starts every slope at 0.01, decays it like a weight, sees it end near zero, and reads that as a preference for
ReLU. Here the start and the decay are varied apart: a slope that began at 0.01 has nowhere to go, and decay pulls any
slope towards zero whatever the loss prefers.
"""

from __future__ import annotations

import math
from itertools import product

import pandas as pd

from normfree.report import (
    Callout,
    Paragraph,
    Section,
    Table,
    entropy_trajectory_distance,
    layerwise_entropy_dynamics,
    negative_slope_trajectories,
    slope_under_decay_only,
    trajectory_distance_matrix,
)
from normfree.runner import Configuration, Findings, Study, StudyPage, layer_entropy_frame, slope_frame
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, LAYERNORM_RELU, RELU, scale_limits
from normfree.training.records import METRICS_FILE

INITIAL_SLOPES = (0.01, 0.25, 0.0, -0.1)
SHARINGS = {"layerwise": "layer", "global": "global"}


def learnable(sharing: str, initial: float, *, decayed: bool) -> Configuration:
    """A norm-free model with learnable slopes, ``layerwise`` or ``global``, that start at ``initial``."""
    return Configuration(
        f"{sharing} {initial:g}" + ("" if decayed else ", no decay"),
        {
            "norm": "none",
            "activation": "learnable_leaky_relu",
            "slope_sharing": SHARINGS[sharing],
            "negative_slope": initial,
        },
        {"decay_slopes": decayed},
    )


LEARNABLE = {
    learnable(sharing, initial, decayed=decayed).label: (sharing, initial, decayed)
    for sharing, decayed, initial in product(SHARINGS, (True, False), INITIAL_SLOPES)
}
"""Sharing, initial slope and decay of each configuration, by label; a row of the paper's figure each four."""

FIGURE_4 = ("SM+LN+G", "SM+LN+R", "SM+G", "SM+R", "layerwise 0.01", "global 0.01")


def describe(page: StudyPage) -> Findings:
    """Figure 3 with its controls, Figure 4 with a number for "near-identical", and what is left without decay."""
    finished = [each for each in page.results if each.row["configuration"] in LEARNABLE]
    if not finished:
        return Findings("No model with learnable slopes has been trained yet.", [], scale_limits(page) + _LIMITS)
    ends = _ends(page)
    entropy = layer_entropy_frame(each for each in page.results if each.row["configuration"] in FIGURE_4)
    distances = entropy_trajectory_distance(entropy)
    sections = [
        Section(
            "Where the slopes go",
            [
                page.figure(
                    "negative-slopes",
                    negative_slope_trajectories(slope_frame(finished), decay_only=_decay_only(page)),
                    "Learned negative slope of each layer over training (compare Figure 3 of the paper, which has the "
                    "two panels that start at 0.01 with decay): rows share the sharing and the decay, columns the "
                    "initial slope. Dashed: where weight decay alone would have taken it.",
                ),
                Table(
                    ends,
                    "Slopes at the end of training, mean over seeds; min and max are over layers.",
                    formats=dict.fromkeys(ends.columns[3:], "+.4f"),
                    notes=["Decay alone: the initial slope times Π (1 − η λ) over the schedule, with no gradient."],
                ),
            ],
        ),
        Section(
            "Are the entropy patterns near-identical?",
            [
                page.figure(
                    "layerwise-entropy-six",
                    layerwise_entropy_dynamics(entropy, bound=page.uniform_bound),
                    "Entropy of each layer over training, mean over its heads, on training batches (compare Figure 4).",
                ),
                page.figure(
                    "trajectory-distance",
                    trajectory_distance_matrix(distances),
                    "Root mean square distance between layer-wise entropy trajectories, in nats. Between "
                    "configurations: runs of the same seed. On the diagonal: different seeds of one configuration.",
                ),
                Paragraph(_near_identical(distances)),
                *([] if page.results[0].row["seed"] != page.results[-1].row["seed"] else [_ONE_SEED]),
            ],
        ),
    ]
    return Findings(_lead(ends), sections, scale_limits(page) + _LIMITS)


_ONE_SEED = Callout("One seed: there is no distance between seeds to measure these distances by.", "warning")
_LIMITS = (
    "How far a slope travels depends on the number of steps and on the learning rate: one that has not reached zero "
    "after a short training may still do so later."
)


def _ends(page: StudyPage) -> pd.DataFrame:
    """One row a configuration: sharing, initial slope, decay; final slopes (mean, min, max); under decay alone."""
    slopes = slope_frame(each for each in page.results if each.row["configuration"] in LEARNABLE)
    final = slopes[slopes["step"] == slopes["step"].max()]
    alone = _decay_only(page).groupby("configuration", sort=False)["negative_slope"].last()
    rows = []
    for label, (sharing, initial, decayed) in LEARNABLE.items():
        ends = final.loc[final["configuration"] == label].groupby("layer")["negative_slope"].mean()
        if len(ends):
            rows.append(
                {
                    "Configuration": label,
                    "Sharing": sharing,
                    "Decay": "yes" if decayed else "no",
                    "Initial": initial,
                    "Decay alone": float(alone[label]),
                    "Final, mean": ends.mean(skipna=False),
                    "Min": ends.min(skipna=False),
                    "Max": ends.max(skipna=False),
                }
            )
    return pd.DataFrame(rows)


def _decay_only(page: StudyPage) -> pd.DataFrame:
    """configuration, step, negative_slope: the slopes under decay and no gradient."""
    frames: list[pd.DataFrame] = []
    for result in page.results:
        label = result.row["configuration"]
        if label not in LEARNABLE or any(label == each["configuration"].iloc[0] for each in frames):
            continue
        metrics = pd.read_parquet(result.folder / METRICS_FILE)
        rates = metrics[metrics["name"] == "learning_rate"].set_index("step")["value"].sort_index()
        _, initial, decayed = LEARNABLE[label]
        path = slope_under_decay_only(initial, rates, page.folder.preset.recipe.weight_decay if decayed else 0.0)
        frames.append(path.rename_axis("step").reset_index().assign(configuration=label))
    return pd.concat(frames, ignore_index=True)


def _lead(ends: pd.DataFrame) -> str:
    """Which part of "all slopes go to zero" is left without decay, in words that hold whatever the numbers are."""
    sentences = []
    for decay, words in (("yes", "With weight decay on the slopes"), ("no", "Without it")):
        rows = ends[(ends["Decay"] == decay) & ends["Final, mean"].notna()]
        moved = rows[rows["Initial"] != 0]
        closer = moved[moved["Final, mean"].abs() < moved["Decay alone"].abs()]
        within = rows[rows[["Min", "Max"]].abs().max(axis=1) <= abs(INITIAL_SLOPES[0])]
        sentences.append(
            f"{words}, {len(within)} of {len(rows)} configurations end with every slope within "
            f"±{INITIAL_SLOPES[0]:g} of zero, and {len(closer)} of the {len(moved)} that started elsewhere end nearer "
            "to zero, on average over layers, than decay alone explains."
        )
    rows = ends[(ends["Decay"] == "no") & (ends["Initial"] != 0)]
    ends_at = ", ".join(f"{row['Configuration']}: {row['Final, mean']:+.3f}" for _, row in rows.iterrows())
    sentences.append(f"Final slopes without decay, mean over layers: {ends_at}.")
    return " ".join(sentences)


def _near_identical(distances: pd.DataFrame) -> str:
    """Compares the distance of the learned slopes from SM+R with that between two seeds of SM+R."""
    relu = RELU.label
    if relu not in distances:
        return (
            f"{relu}, to which the paper finds the entropy dynamics of learned slopes near-identical, is not trained."
        )
    compared = [label for label in (*FIGURE_4[-2:], GELU.label, relu) if label in distances]
    far = {label: float(distances[label].to_dict()[relu]) for label in compared}
    apart = ", ".join(f"{label} {distance:.3f}" for label, distance in far.items() if label != relu)
    yardstick = (
        "with one seed there is no yardstick"
        if math.isnan(far[relu])
        else f"two seeds of {relu} are {far[relu]:.3f} nats apart"
    )
    return (
        "The paper calls the entropy dynamics of ReLU and of the two learned slopes near-identical, by eye. Distance "
        f"from {relu} in nats: {apart}; {yardstick}."
    )


STUDY = Study(
    name="learnable-slopes",
    title="ReLU's Revival: do learnable negative slopes go to zero?",
    question="Do learnable slopes of leaky ReLU go to zero, and would they without weight decay?",
    baseline=LAYERNORM_GELU.label,
    configurations=lambda preset: (
        LAYERNORM_GELU,
        LAYERNORM_RELU,
        GELU,
        RELU,
        *(learnable(sharing, initial, decayed=decayed) for sharing, initial, decayed in LEARNABLE.values()),
    ),
    describe=describe,
)
