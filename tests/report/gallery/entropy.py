"""Attention entropy: heatmaps, distributions, dynamics, and where it collapses."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from normfree import plot
from normfree.studies.learnable_slopes import trajectory_distance_matrix

from .frames import BOUND, FOUR, HEADS, SPARSE, entropy_over_training, heads, hybrids
from .registry import drawn


@drawn
def headwise_entropy(n_layer: int) -> Figure:
    return plot.headwise_entropy_heatmaps(heads(n_layer), maximum=BOUND)


@drawn
def headwise_entropy_with_nan(n_layer: int) -> Figure:
    frame = heads(n_layer, seeds=(0, 1))
    frame.loc[(frame["configuration"] == "SM+G") & (frame["layer"] > 0) & (frame["seed"] == 1), "entropy_nats"] = np.nan
    frame.loc[frame["configuration"] == "SM+R", "entropy_nats"] = np.nan
    return plot.headwise_entropy_heatmaps(frame, maximum=BOUND)


@drawn
def headwise_entropy_of_one_model(n_layer: int) -> Figure:
    return plot.headwise_entropy_heatmaps(heads(n_layer, ["openai-community/gpt2"]), maximum=4.2)


@drawn
def headwise_entropy_of_many(n_layer: int) -> Figure:
    return plot.headwise_entropy_heatmaps(heads(n_layer, SPARSE), maximum=BOUND)


@drawn
def headwise_entropy_at_the_bound(n_layer: int) -> Figure:
    frame = heads(n_layer, FOUR[2:])
    return plot.headwise_entropy_heatmaps(frame.assign(entropy_nats=BOUND - 0.002 * frame["layer"]), maximum=BOUND)


@drawn
def entropy_distribution(n_layer: int) -> Figure:
    return plot.headwise_entropy_distribution(heads(n_layer))


@drawn
def entropy_distribution_of_seeds(n_layer: int) -> Figure:
    frame = heads(n_layer, SPARSE, seeds=(0, 1, 2))
    frame.loc[(frame["configuration"] == "Spark") & (frame["seed"] == 1), "entropy_nats"] = np.nan
    return plot.headwise_entropy_distribution(frame)


@drawn
def layerwise_entropy(n_layer: int) -> Figure:
    return plot.layerwise_entropy_dynamics(entropy_over_training(n_layer), bound=BOUND)


@drawn
def layerwise_entropy_of_one_model(n_layer: int) -> Figure:
    return plot.layerwise_entropy_dynamics(entropy_over_training(n_layer, ["SM+G"], seeds=(0, 1)), bound=BOUND)


@drawn
def layerwise_entropy_with_nan(n_layer: int) -> Figure:
    frame = entropy_over_training(n_layer, [*FOUR, "layerwise 0.01", "global 0.01"])
    frame.loc[(frame["configuration"] == "SM+G") & (frame["step"] > 600), "entropy_nats"] = np.nan
    frame.loc[frame["configuration"] == "SM+R", "entropy_nats"] = np.nan
    return plot.layerwise_entropy_dynamics(frame, bound=BOUND)


@drawn
def entropy_by_layer(n_layer: int) -> Figure:
    frame = heads(n_layer, hybrids(n_layer))
    marked = {name: range(n_layer // 2) for name in hybrids(n_layer)[::2]}
    return plot.layer_entropy_by_configuration(frame, marked=marked, mark="GELU", maximum=BOUND)


@drawn
def entropy_thresholds(n_layer: int) -> Figure:
    frame = entropy_over_training(n_layer, ["SM+G, penalty 0.001"]).merge(
        pd.DataFrame({"head": range(HEADS[n_layer])}), how="cross"
    )
    threshold = 2.0 + 0.1 * frame["head"] + 0.0004 * frame["step"]
    return plot.entropy_threshold_trajectories(frame.assign(entropy_threshold_nats=threshold), bound=BOUND)


@drawn
def instability(n_layer: int) -> Figure:
    names = ("SM+R", "SM+L 0.01", "SM+L 0.05", "SM+L 0.1", "SM+L 0.2")
    entropy = entropy_over_training(n_layer, names)
    broken = (entropy["configuration"] == "SM+L 0.2") & (entropy["step"] > 500)
    count = np.where(broken, 1000 * (1 + entropy["layer"]), 0)
    counts = entropy.assign(scores_nan_count=count, scores_inf_count=0, residual_nan_count=0, residual_inf_count=count)
    entropy.loc[broken, "entropy_nats"] = np.nan
    return plot.instability_dynamics(counts, entropy, bound=BOUND)


@drawn
def stability(n_layer: int) -> Figure:
    entropy = entropy_over_training(n_layer, ["SM+R"])
    zero = dict.fromkeys(("scores_nan_count", "scores_inf_count", "residual_nan_count", "residual_inf_count"), 0)
    return plot.instability_dynamics(entropy.assign(**zero), entropy, bound=BOUND)


@drawn
def trajectory_distances(n_layer: int) -> Figure:
    names = [*FOUR, "layerwise 0.01", "global 0.01"]
    values = np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0))) * 0.2
    np.fill_diagonal(values, np.nan)
    return trajectory_distance_matrix(pd.DataFrame(values, names, names))
