"""Learnable negative slopes without LayerNorm (ReLU's Revival, Section 3, Figures 3 and 4), with the paper's controls.

The paper starts every slope at 0.01, decays it like a weight, sees it end near zero, and reads that as a preference for
ReLU. Here the start and the decay are varied apart: a slope that began at 0.01 has nowhere to go, and decay pulls any
slope towards zero whatever the loss prefers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from normfree.columns import ENTROPY_NATS, NEGATIVE_SLOPE
from normfree.errors import InputError
from normfree.report import Callout, FigureElement, Paragraph, Section, Table, paper_style
from normfree.report.entropy_figures import layerwise_entropy_dynamics
from normfree.report.frames import (
    DECAY_ONLY,
    LAYER_ENTROPY,
    SLOPES,
    check_columns,
    check_frame,
    check_one_setting,
    in_order,
)
from normfree.report.numbers import number
from normfree.report.primitives import annotated_heatmap, colour_bar, depth_bar, layer_curves, panel_grid, title_panel
from normfree.report.style import DASHED, INK, ONE_COLUMN, entropy_colours
from normfree.runner import Configuration, Findings, Study, StudyPage, layer_entropy_frame, telemetry_frame
from normfree.studies.relu_revival import GELU, LAYERNORM_GELU, LAYERNORM_RELU, PAPER, RELU, scale_limits
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
                _trajectories(page),
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
                *([_ONE_SEED] if np.isnan(np.diag(distances)).all() else []),
            ],
        ),
    ]
    return Findings(_lead(ends), sections, scale_limits(page) + _LIMITS)


_ONE_SEED = Callout(
    "No configuration has two seeds: there is no distance between seeds to measure these distances by.", "warning"
)
_LIMITS = (
    "How far a slope travels depends on the number of steps and on the learning rate: one that has not reached zero "
    "after a short training may still do so later."
)


def _trajectories(page: StudyPage) -> FigureElement:
    """Figure 3, and the panels beside it."""
    slopes = _slopes(page)
    columns = initial_slope_columns(in_order(slopes["configuration"]))
    figure = negative_slope_trajectories(slopes, decay_only=_decay_only(page), n_columns=columns or len(INITIAL_SLOPES))
    return page.figure(
        "negative-slopes",
        figure,
        "Learned negative slope of each layer over training (compare Figure 3 of the paper, which has the two panels "
        f"that start at {INITIAL_SLOPES[0]:g} with decay)"
        + (": rows share the sharing and the decay, columns the initial slope" if columns else "")
        + ". Dashed: where weight decay alone would have taken it.",
    )


def initial_slope_columns(labels: Sequence[str]) -> int | None:
    """Panels in a row, if each sharing with and without decay is there with the same initial slopes; else None."""
    of_row: dict[tuple[str, bool], list[float]] = {}
    for label in labels:
        sharing, initial, decayed = LEARNABLE[label]
        of_row.setdefault((sharing, decayed), []).append(initial)
    first, *others = of_row.values()
    return len(first) if all(each == first for each in others) else None


def _slopes(page: StudyPage) -> pd.DataFrame:
    """The columns of a run, step, layer, negative_slope. A slope that all layers share is that of the first of them."""
    slopes = telemetry_frame(page.results, [NEGATIVE_SLOPE])
    slopes = slopes[slopes["configuration"].isin(LEARNABLE)]
    is_global = slopes["configuration"].map(lambda label: LEARNABLE[label][0] == "global")
    return slopes[~is_global | (slopes["layer"] == slopes["layer"].min())]


def _ends(page: StudyPage) -> pd.DataFrame:
    """One row a configuration: sharing, initial slope, decay; final slopes (mean, min, max); under decay alone."""
    slopes = _slopes(page)
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
    first = {each.row["configuration"]: each for each in reversed(page.results)}
    frames = []
    for label in [label for label in reversed(first) if label in LEARNABLE]:
        metrics = pd.read_parquet(first[label].folder / METRICS_FILE)
        rates = metrics[metrics["name"] == "learning_rate"].set_index("step")["value"].sort_index()
        _, initial, decayed = LEARNABLE[label]
        path = slope_under_decay_only(initial, rates, page.folder.preset.recipe.weight_decay if decayed else 0.0)
        frames.append(path.rename_axis("step").reset_index().assign(configuration=label))
    return pd.concat(frames, ignore_index=True)


def _lead(ends: pd.DataFrame) -> str:
    """The part of "all slopes go to zero" that is left without decay."""
    sentences = []
    for decay, words in (("yes", "With"), ("no", "Without")):
        rows = ends[(ends["Decay"] == decay) & ends["Final, mean"].notna()]
        if rows.empty:
            continue
        moved = rows[rows["Initial"] != 0]
        closer = moved[moved["Final, mean"].abs() < moved["Decay alone"].abs()]
        within = rows[rows[["Min", "Max"]].abs().max(axis=1) <= abs(INITIAL_SLOPES[0])]
        told = (
            f"{words} weight decay on the slopes, {len(within)} of {len(rows)} configurations end with every slope "
            f"within ±{INITIAL_SLOPES[0]:g} of zero"
        )
        if len(moved):
            told += (
                f", and {len(closer)} of the {len(moved)} that started elsewhere end nearer to zero, on average over "
                "layers, than decay alone explains"
            )
        sentences.append(f"{told}.")
    rows = ends[(ends["Decay"] == "no") & (ends["Initial"] != 0)]
    if len(rows):
        ends_at = "; ".join(
            f"{row['Configuration']}: {number(row['Final, mean'], '+.3f')}" for _, row in rows.iterrows()
        )
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
    apart = "; ".join(f"{label}: {number(distance, '.3f')}" for label, distance in far.items() if label != relu)
    yardstick = (
        "With one seed there is no yardstick"
        if math.isnan(far[relu])
        else f"Two seeds of {relu} are {far[relu]:.3f} nats apart"
    )
    return (
        "The paper calls the entropy dynamics of ReLU and of the two learned slopes near-identical, by eye. Distance "
        f"from {relu} in nats: {apart}. {yardstick}."
    )


@paper_style()
def negative_slope_trajectories(slopes: pd.DataFrame, *, decay_only: pd.DataFrame, n_columns: int = 4) -> Figure:
    """The learned slope of each layer over training, a panel each configuration (ReLU's Revival, Figure 3).

    Lines go from light (first layer) to dark (last) and are means over seeds; a slope that all layers share is one
    black line. The dashed line is where weight decay alone would have taken the initial slope.

    Args:
        slopes: columns model, context_length, configuration, seed, step, layer, negative_slope.
        decay_only: columns configuration, step, negative_slope: see :func:`slope_under_decay_only`.
        n_columns: panels in a row, filled row by row in the order of ``slopes``.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, or the frame mixes models or context lengths.
    """
    check_frame(slopes, "slopes", SLOPES, ("negative_slope",))
    check_one_setting(slopes, "slopes")
    check_columns(decay_only, "decay_only", DECAY_ONLY)  # without weight decay it has no row
    configurations = in_order(slopes["configuration"])
    layers = sorted(in_order(slopes["layer"]))
    figure, grid = panel_grid(len(configurations), n_columns, row_height=1.35, above=0.35, sharex=True, sharey=True)
    for axes, configuration in zip(grid.flat, configurations, strict=False):
        runs = slopes[slopes["configuration"] == configuration]
        shared = ListedColormap([INK] * len(layers)) if runs["layer"].nunique() == 1 else None
        layer_curves(axes, runs, "negative_slope", layers, colours=shared)
        alone = decay_only[decay_only["configuration"] == configuration]
        axes.plot(alone["step"], alone["negative_slope"], **DASHED)
        axes.axhline(0, color=INK, linewidth=0.5)
        title_panel(axes, configuration.replace(" -", " \N{MINUS SIGN}"), size=6.5)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    n_seeds = slopes["seed"].nunique()
    note = f"mean over {n_seeds} seeds; " if n_seeds > 1 else ""
    figure.supxlabel(f"training step ({note}dashed: weight decay alone)", fontsize=7)
    figure.supylabel("negative slope of leaky ReLU", fontsize=7)
    depth_bar(figure, grid, layers, "layer")
    return figure


def slope_under_decay_only(initial: float, learning_rates: pd.Series, weight_decay: float) -> pd.Series:
    """Where AdamW's decoupled decay alone takes a slope: initial · Π (1 − η_t λ), indexed by step.

    Args:
        initial: the slope before the first step.
        learning_rates: η by step, from 1, possibly with steps left out; each value is that of the steps since the one
            before it.
        weight_decay: λ (Loshchilov & Hutter 2019, Algorithm 2).
    """
    steps = learning_rates.index.to_numpy()
    elapsed = np.diff(steps, prepend=0)
    factors = (1 - weight_decay * learning_rates.to_numpy(dtype=np.float64)) ** elapsed
    path = initial * np.cumprod(factors)
    return pd.Series([initial, *path], index=[0, *steps], name="negative_slope")


def entropy_trajectory_distance(layer_entropy: pd.DataFrame) -> pd.DataFrame:
    """Distance between the layer-wise entropies of each two configurations over training, in nats.

    d(a, b) = sqrt(mean over steps t and layers l of (Ē_a(l, t) − Ē_b(l, t))²), with Ē the mean over heads. Between two
    configurations it is taken between runs of the same seed, which start from the same weights and see the same
    batches, and averaged over seeds. On the diagonal it is the mean over all pairs of different seeds of one
    configuration: the yardstick, for what differs by less than two seeds do cannot be told apart.

    Args:
        layer_entropy: columns model, context_length, configuration, seed, step, layer, entropy_nats.

    Returns:
        A square frame of distances, configurations as index and columns, in order of first appearance. NaN on the
        diagonal with one seed, between configurations without a common one, and wherever a trajectory holds a NaN.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, or the trajectories have different steps or
            layers.
    """
    check_frame(layer_entropy, "layer_entropy", LAYER_ENTROPY, (ENTROPY_NATS,))
    check_one_setting(layer_entropy, "layer_entropy")
    configurations = in_order(layer_entropy["configuration"])
    runs = layer_entropy.groupby(["configuration", "seed"], sort=False)
    trajectories: dict[Any, pd.Series] = {
        run: each.set_index(["step", "layer"])[ENTROPY_NATS].sort_index() for run, each in runs
    }
    seeds = {name: [seed for label, seed in trajectories if label == name] for name in configurations}
    distances = pd.DataFrame(np.nan, index=configurations, columns=configurations)
    for a, b in product(configurations, repeat=2):
        if a == b:
            pairs = [(first, second) for first, second in product(seeds[a], repeat=2) if first < second]
        else:
            pairs = [(seed, seed) for seed in seeds[a] if seed in seeds[b]]
        if pairs:
            distances.loc[a, b] = np.mean([_distance(trajectories[a, i], trajectories[b, j]) for i, j in pairs])
    return distances


def _distance(a: pd.Series, b: pd.Series) -> float:
    if not a.index.equals(b.index):
        raise InputError("two runs have telemetry at different steps or layers; compare runs of one study")
    return float(np.sqrt(np.mean((a.to_numpy() - b.to_numpy()) ** 2)))


@paper_style()
def trajectory_distance_matrix(distances: pd.DataFrame) -> Figure:
    """The distances of :func:`entropy_trajectory_distance` as an annotated matrix; no distance is hatched."""
    n = len(distances)
    figure = Figure(figsize=(max(ONE_COLUMN, 0.45 * n + 1.2), 0.36 * n + 1.0), layout="constrained")
    axes = figure.subplots()
    values = distances.to_numpy(dtype=np.float64)
    norm = Normalize(0, max(values[np.isfinite(values)], default=0.0) or 1.0)
    colours, names = entropy_colours(), [str(name) for name in distances.index]
    annotated_heatmap(
        axes,
        values,
        norm,
        colours,
        rows=names,
        columns=names,
        text=lambda each: f"{each:.2f}" if np.isfinite(each) else "\N{EN DASH}",
    )
    axes.set_xticks(range(n), names, rotation=30, ha="right", rotation_mode="anchor")
    colour_bar(figure, axes, norm, colours, "distance of trajectories (nats)")
    return figure


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
    papers=(PAPER,),
)
