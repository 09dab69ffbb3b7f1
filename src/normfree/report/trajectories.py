"""How far apart the entropy trajectories of two configurations are: a number for "near-identical"."""

from itertools import product

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from normfree.errors import InputError
from normfree.report.frames import LAYER_ENTROPY, check_frame, check_one_setting, in_order
from normfree.report.style import INK, ONE_COLUMN, entropy_colours, paper_style, readable_on


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
        diagonal with one seed, and wherever a trajectory holds a NaN.

    Raises:
        InputError: a column is missing, a layer occurs twice at a step, two configurations share no seed, or the
            trajectories have different steps or layers.
    """
    check_frame(layer_entropy, "layer_entropy", LAYER_ENTROPY, ("entropy_nats",))
    check_one_setting(layer_entropy, "layer_entropy")
    configurations = in_order(layer_entropy["configuration"])
    trajectories = {}
    seeds: dict[str, list[int]] = {name: [] for name in configurations}
    for name, runs in layer_entropy.groupby("configuration", sort=False):
        for seed in in_order(runs["seed"]):
            run = runs[runs["seed"] == seed]
            seeds[str(name)].append(seed)
            trajectories[str(name), seed] = run.set_index(["step", "layer"])["entropy_nats"].sort_index()
    distances = pd.DataFrame(np.nan, index=configurations, columns=configurations)
    for a, b in product(configurations, repeat=2):
        if a == b:
            pairs = [(first, second) for first, second in product(seeds[a], repeat=2) if first < second]
        else:
            pairs = [(seed, seed) for seed in seeds[a] if seed in seeds[b]]
            if not pairs:
                raise InputError(f"{a} and {b} have no seed in common, so their trajectories cannot be paired")
        if pairs:
            distances.loc[a, b] = np.mean([_distance(trajectories[a, i], trajectories[b, j]) for i, j in pairs])
    return distances


def _distance(a: pd.Series, b: pd.Series) -> float:
    if not a.index.equals(b.index):
        raise InputError("two runs have telemetry at different steps or layers; compare runs of one study")
    return float(np.sqrt(np.mean((a.to_numpy() - b.to_numpy()) ** 2)))


def trajectory_distance_matrix(distances: pd.DataFrame) -> Figure:
    """The distances of :func:`entropy_trajectory_distance` as an annotated matrix."""
    n = len(distances)
    with paper_style():
        figure = Figure(figsize=(max(ONE_COLUMN, 0.45 * n + 1.2), 0.36 * n + 1.0), layout="constrained")
        axes = figure.subplots()
        values = distances.to_numpy(dtype=np.float64)
        top = (float(np.nanmax(values)) if np.isfinite(values).any() else 0.0) or 1.0
        colours = entropy_colours()
        shown = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=top, aspect="auto")
        for row, column in product(range(n), repeat=2):
            value = values[row, column]
            colour = readable_on(colours, value / top) if np.isfinite(value) else INK
            text = f"{value:.2f}" if np.isfinite(value) else "\N{EN DASH}"
            axes.text(column, row, text, ha="center", va="center", fontsize=5.8, color=colour)
        axes.set_xticks(range(n), distances.columns, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), distances.index)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(shown, ax=axes, aspect=22, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("distance of trajectories (nats)")
    return figure
